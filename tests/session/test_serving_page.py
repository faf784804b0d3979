"""The code of docs/serving.md runs as it stands."""

from __future__ import annotations

import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.shipped import clip, decoder

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ASYNCIO, HTTP, RAY = range(3)


def ran(block: int, capsys: pytest.CaptureFixture[str], names: dict[str, Any] | None = None) -> list[str]:
    """Lines that a block prints; its classes are those of a script, which Ray sends to its actors."""
    names = {} if names is None else names
    names["__name__"] = "__main__"
    exec(compile(BLOCKS[block], "docs/serving.md", "exec"), names)
    return capsys.readouterr().out.splitlines()


def texts(count: int) -> list[str]:
    clips = [clip(number) for number in range(count)]
    return [result.text for result in decoder().transcribe(clips, beam_size=2, lm_weight=0.8)]


def test_the_page_has_three_examples() -> None:
    assert len(BLOCKS) == 3
    assert ["asyncio.run" in BLOCKS[0], "ThreadingHTTPServer" in BLOCKS[1], "import ray" in BLOCKS[2]] == [True] * 3


def test_futures_and_asyncio(capsys) -> None:
    lines = ran(ASYNCIO, capsys)
    assert len(lines) == 3
    assert all(lines)


def test_the_http_service(capsys) -> None:
    before, names = threading.active_count(), {}
    assert ran(HTTP, capsys, names) == texts(2)[1:]
    assert threading.active_count() == before
    with decoder().session() as session, ThreadingHTTPServer(("127.0.0.1", 0), names["Service"]) as server:
        names["session"] = session
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        for query, body, words in [
            ("", b"no recording at all", "Format not recogni"),
            ("", b"", "must have 1 to 20000000 bytes"),
            ("?bean_size=2", clip(1).read_bytes(), "unknown option bean_size"),
            ("?beam_size=0", clip(1).read_bytes(), "beam_size must be an integer of at least 1"),
            ("?beam_size=two", clip(1).read_bytes(), "invalid literal"),
        ]:
            with pytest.raises(HTTPError) as refused:
                urlopen(url + query, data=body)
            assert refused.value.code == 400
            assert words in json.load(refused.value)["error"]
        names["MOST_WAITING"] = 0
        with pytest.raises(HTTPError) as refused:
            urlopen(url, data=clip(1).read_bytes())
        assert refused.value.code == 503
        with urlopen(url) as answered:
            assert json.load(answered) == {"queued": 0, "running": 0, "finished": 0}
        server.shutdown()


@pytest.mark.slow
def test_actors_of_ray(capsys) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert ran(RAY, capsys)[-4:] == texts(4)
    finally:
        ray.shutdown()
