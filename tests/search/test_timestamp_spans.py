"""Segments from tokens, with a small alphabet and with Whisper's own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from shallowfusion.scorers.loading import whisper_tokens
from shallowfusion.search.timestamp_spans import spans_of
from shallowfusion.search.timestamps import TimestampRules
from shallowfusion.text.vocabulary import vocabulary_of
from shallowfusion.values import Span

TOKENIZER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers" / "whisper-large-v3"
RULES = TimestampRules(12, 50, 10)
WORDS = ("", " a", " b", "c ", " ")


def text_of(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def found(*ids: int) -> list[tuple[float, float | None, str]]:
    return [(span.start, span.end, span.text) for span in spans_of(RULES, ids, text_of)]


def test_pairs_of_timestamps_hold_text_and_the_last_may_stay_open() -> None:
    assert found() == []
    assert found(12) == []
    assert found(12, 1, 17) == [(0.0, 0.1, "a")]
    assert found(13, 1, 2, 17, 17, 1, 22) == [(0.02, 0.1, "a b"), (0.1, 0.2, " a")]
    assert found(13, 1, 17, 20, 3) == [(0.02, 0.1, "a"), (0.16, None, "c")]
    assert found(12, 1, 17, 17) == [(0.0, 0.1, "a")]
    assert spans_of(RULES, (13, 1, 2, 17, 17, 1), text_of)[1] == Span(0.1, None, " a", 5, 6)


def test_blanks_at_the_ends_are_in_no_span() -> None:
    assert found(12, 4, 17, 17, 1, 18, 18, 4) == [(0.0, 0.1, ""), (0.1, 0.12, "a"), (0.12, None, "")]


@pytest.mark.skipif(not TOKENIZER.exists(), reason="the shared tokenizers are not here")
def test_whisper_s_own_tokenizer_cuts_the_same_segments() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(TOKENIZER))
    config = SimpleNamespace(
        decoder_start_token_id=50258, eos_token_id=50257, vocab_size=51866, max_source_positions=1500
    )
    tokens = whisper_tokens(SimpleNamespace(generation_config=SimpleNamespace(), config=config), tokenizer)
    listed = json.loads((TOKENIZER / "added_tokens.json").read_text(encoding="utf-8"))
    assert tokens.no_timestamps == listed["<|notimestamps|>"]
    assert tokens.num_timestamps == 1501
    rules = TimestampRules(tokens.no_timestamps + 1, tokens.num_timestamps, tokens.end)
    assert [rules.seconds(listed[f"<|{time:.2f}|>"]) for time in (0, 0.02, 6.44, 30)] == [0.0, 0.02, 6.44, 30.0]
    assert rules.stop == config.vocab_size
    own = vocabulary_of(tokenizer, config.vocab_size, tokens.end)
    assert all(token is None for token in own.tokens[rules.begin :])

    def seconds(time: float) -> int:
        return int(listed[f"<|{time:.2f}|>"])

    said = [tokenizer.encode(text, add_special_tokens=False) for text in (" He has grave doubts", " über Größe.")]
    ids = [seconds(0.0), *said[0], seconds(6.44), seconds(6.44), *said[1], seconds(9.44)]
    spans = spans_of(rules, ids, lambda part: tokenizer.decode(list(part), skip_special_tokens=True))
    expected = tokenizer.decode(ids, output_offsets=True)["offsets"]
    assert [(span.start, span.end) for span in spans] == [own["timestamp"] for own in expected]
    assert [span.text.strip() for span in spans] == [own["text"].strip() for own in expected]
