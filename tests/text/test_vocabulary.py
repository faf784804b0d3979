"""Which tokenizers are equal is proved token by token."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from shallowfusion.errors import VocabularyError
from shallowfusion.text.vocabulary import Vocabulary, token_map, vocabulary_of

TOKENIZERS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"
needs_data = pytest.mark.skipif(not TOKENIZERS.exists(), reason="the shared tokenizers are not here")


def ranks(name: str) -> list[bytes]:
    lines = (TOKENIZERS / "openai-whisper" / name).read_text().splitlines()
    pairs = [line.split() for line in lines if line]
    return [base64.b64decode(token) for token, rank in sorted(pairs, key=lambda pair: int(pair[1]))]


def whisper_en() -> Vocabulary:
    """English-only Whisper as openai publishes it: the ranks, end of text, then 1,607 special tokens."""
    tokens = ranks("gpt2.tiktoken")
    return Vocabulary((*tokens, *[None] * (51_864 - len(tokens))), end_id=50_256, name="whisper-small.en")


def gpt2() -> Vocabulary:
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(TOKENIZERS / "gpt2")
    return vocabulary_of(tokenizer, 50_257, end_id=50_256, begin_id=50_256, name="gpt2")


@needs_data
def test_english_whisper_and_gpt2_are_equal_on_0_to_50256() -> None:
    acoustic, language = whisper_en(), gpt2()
    assert acoustic.tokens[:50_256] == language.tokens[:50_256]
    assert acoustic.end_id == language.end_id == 50_256
    assert token_map(acoustic, language, include_end=True) is None
    mapped = token_map(acoustic, language, include_end=False)
    assert mapped is not None
    assert mapped[50_255] == 50_255
    assert (mapped[50_256:] == -1).all()


@needs_data
def test_multilingual_whisper_and_gpt2_are_refused_with_the_first_difference() -> None:
    tokens = ranks("multilingual.tiktoken")
    acoustic = Vocabulary((*tokens, *[None] * (51_866 - len(tokens))), end_id=50_257, name="whisper-large-v3")
    with pytest.raises(VocabularyError, match=r"no counterpart.*first difference: id \d+ .*English-only Whisper"):
        token_map(acoustic, gpt2(), include_end=True)


@needs_data
def test_multilingual_files_of_two_publishers_agree() -> None:
    stored = json.loads((TOKENIZERS / "whisper-large-v3" / "vocab.json").read_text())
    from shallowfusion.text.vocabulary import byte_alphabet, token_bytes

    alphabet = byte_alphabet()
    by_id = {i: token_bytes(token, alphabet) for token, i in stored.items()}
    published = ranks("multilingual.tiktoken")
    assert [by_id[i] for i in range(50_257)] == published


def test_fingerprints_tell_vocabularies_apart() -> None:
    one = Vocabulary((b"a", b"b", None), end_id=2)
    assert one.fingerprint == Vocabulary((b"a", b"b", None), end_id=2, name="other").fingerprint
    assert one.fingerprint != Vocabulary((b"a", b"b", None), end_id=1).fingerprint
    assert one.fingerprint != Vocabulary((b"ab", b"", None), end_id=2).fingerprint


def test_permuted_tokens_are_mapped_and_ends_on_demand() -> None:
    acoustic = Vocabulary((b"a", b"b", b"c", None, None), end_id=3)
    language = Vocabulary((None, b"c", b"b", b"a"), end_id=0)
    with_end = token_map(acoustic, language, include_end=True)
    assert torch.equal(with_end, torch.tensor([3, 2, 1, 0, -1], dtype=torch.int32))
    without = token_map(acoustic, language, include_end=False)
    assert torch.equal(without, torch.tensor([3, 2, 1, -1, -1], dtype=torch.int32))


def test_a_special_token_with_the_id_of_a_word_is_not_mapped_to_it() -> None:
    acoustic = Vocabulary((b"a", b"b", None, None), end_id=2)
    language = Vocabulary((b"a", b"b", None, b"b"), end_id=2)
    mapped = token_map(acoustic, language, include_end=True)
    assert torch.equal(mapped, torch.tensor([0, 1, 2, -1], dtype=torch.int32))


def test_missing_tokens_are_counted() -> None:
    acoustic = Vocabulary((b"a", b"b", b"x", b"y"), end_id=0, name="A")
    language = Vocabulary((b"a", b"b"), end_id=0, name="L")
    with pytest.raises(VocabularyError, match=r"\(A\).*\(L\): 2 of 4 text tokens.*id 2 is b'x' against None"):
        token_map(acoustic, language, include_end=False)


def test_factors_of_token_classes_multiply() -> None:
    from shallowfusion.text.vocabulary import class_factors

    vocabulary = Vocabulary((b"a", b" a", b"12", b" 7", b" ", b"3rd", None, None), 6)
    factors = {"end": 2.0, "timestamps": 3.0, "digits": 5.0, "word_initial": 7.0}
    assert class_factors(vocabulary, factors).tolist() == [1, 7, 5, 35, 1, 1, 2, 3]
    assert class_factors(vocabulary, {}).tolist() == [1] * 8


def test_a_language_model_with_longer_tokens_beside_the_acoustic_ones_is_refused() -> None:
    """It reads text cut into its long tokens; letter by letter it says nonsense, though every letter has an id."""
    letters = Vocabulary((b"a", b"b", None), 2, name="letters")
    pairs = Vocabulary((b"a", b"b", b"ab", None), 3, 3, name="pairs")
    with pytest.raises(VocabularyError, match=r"pairs\) has 1 text tokens that the acoustic model \(letters\) has not"):
        token_map(letters, pairs, include_end=False)


def test_a_map_is_made_once_for_equal_vocabularies() -> None:
    acoustic, again = (Vocabulary((b"a", b"b", None), 2, name="asr") for _ in range(2))
    language = Vocabulary((b"b", b"a"), 1, 1)
    assert acoustic == again
    assert hash(acoustic) == hash(again)
    first = token_map(acoustic, language, include_end=False)
    assert first is not None
    assert first.tolist() == [1, 0, -1]
    assert token_map(again, language, include_end=False) is first
