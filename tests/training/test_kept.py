"""Pieces of a long run: made once, never half, plain data only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shallowfusion.errors import InvalidArgumentError
from shallowfusion.training.kept import Kept, digest_of


def test_a_piece_is_made_once_and_comes_back_whole(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"words": ["a", "b"], "numbers": torch.arange(3)}

    for _ in range(2):
        found = Kept(tmp_path / "work").had(("one", 2), make)
        assert found["words"] == ["a", "b"]
        assert torch.equal(found["numbers"], torch.arange(3))
    assert len(made) == 1
    Kept(tmp_path / "work").had(("one", 3), make)
    Kept(None).had(("one", 2), make)
    assert len(made) == 3


@pytest.mark.parametrize("left", [b"", b"PK\x03\x04 cut short", b"cos\nsystem\n(S'false'\ntR."])
def test_a_file_cut_short_or_of_another_kind_is_made_again(tmp_path: Path, left: bytes) -> None:
    kept = Kept(tmp_path)
    (tmp_path / f"{digest_of('x')}.pt").write_bytes(left)
    assert kept.had(("x",), lambda: [4]) == [4]
    assert kept.had(("x",), lambda: [5]) == [4]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path).had(("x",), fail)
    assert list(tmp_path.iterdir()) == []


def test_digests_tell_values_apart() -> None:
    one = torch.tensor([1.0, 2.0])
    assert digest_of("a", one) == digest_of("a", one.clone())
    assert (
        len({digest_of("a", one), digest_of("a", one + 1), digest_of("b", one), digest_of("ab"), digest_of("a", "b")})
        == 5
    )


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="cannot be made"):
        Kept(tmp_path / "file" / "work")
