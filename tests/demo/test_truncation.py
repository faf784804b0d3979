"""The early-termination failure of the published recipe on real models, and its absence with the default."""

from __future__ import annotations

import pytest

from shallowfusion import fusion
from shallowfusion.decoder import FusionDecoder
from shallowfusion.demo.shipped import HERE, decoders, read_manifest

HIGH, WIDE = 1.0, 16


@pytest.fixture(scope="module")
def medical() -> FusionDecoder:
    return decoders("cpu")["medical"]


def words_heard(decoder: FusionDecoder, **options: object) -> tuple[int, int]:
    """Words in the transcripts of the development clips, and how many transcripts carry the truncation flag."""
    paths = [clip.path for clip in read_manifest(HERE / "dev")]
    results = decoder.transcribe(paths, beam_size=WIDE, length_penalty=0.0, **options)
    return sum(len(r.text.split()) for r in results), sum("truncation" in r.flags for r in results)


def test_the_article_truncates_at_high_weight_and_wide_beams_and_the_default_does_not(medical) -> None:
    said = sum(len(clip.text.split()) for clip in read_manifest(HERE / "dev"))
    article, flagged = words_heard(medical, rule=fusion.article(HIGH, 2), end_threshold=None)
    default, unflagged = words_heard(medical, rule=fusion.static(HIGH))
    assert article < 0.8 * said
    assert flagged >= 5  # what is cut is not cut silently
    assert default > 0.95 * said
    assert unflagged == 0


def test_a_loud_language_model_loops_with_a_flag_and_the_default_does_not(medical) -> None:
    clip = next(clip.path for clip in read_manifest(HERE / "clips") if clip.text.startswith("twenty three families"))
    loud = {"rule": fusion.static(4.0), "end_policy": "lm", "beam_size": 8, "max_new_tokens": 300}
    looped = medical.transcribe([clip], **loud)[0]
    assert "repetition" in looped.flags  # what runs away does not do so silently
    assert repeated(looped.best.token_ids, 8)
    default = medical.transcribe([clip], rule=fusion.static(0.8), beam_size=8)[0]
    assert default.flags == ()
    guarded = medical.transcribe([clip], no_repeat_ngram_size=8, **loud)[0]
    assert not repeated(guarded.best.token_ids, 8)


def repeated(ids: tuple[int, ...], size: int) -> bool:
    groups = [ids[start : start + size] for start in range(len(ids) - size + 1)]
    return len(set(groups)) < len(groups)
