"""The demo's shared character vocabulary, and the tokenizer files that spell it for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shallowfusion.errors import VocabularyError

__all__ = [
    "BLANK",
    "CHARACTERS",
    "END_OF_TEXT",
    "NO_TIMESTAMPS",
    "START_OF_TRANSCRIPT",
    "TEXT_VOCAB_SIZE",
    "WHISPER_VOCAB_SIZE",
    "decode",
    "encode",
    "write_tokenizer",
]

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
# Whisper's and GPT-2's byte-level alphabet writes the space as this letter.
_SPACE_SYMBOL = "\u0120"

END_OF_TEXT = len(CHARACTERS)
TEXT_VOCAB_SIZE = END_OF_TEXT + 1
START_OF_TRANSCRIPT = TEXT_VOCAB_SIZE
NO_TIMESTAMPS = TEXT_VOCAB_SIZE + 3
WHISPER_VOCAB_SIZE = TEXT_VOCAB_SIZE + 4
# The CTC head knows the characters and, last, the blank. It never emits the end of text, whose id this shares.
BLANK = len(CHARACTERS)

_TEXT_SPECIALS = ("<|endoftext|>",)
_WHISPER_SPECIALS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)
_IDS = {character: number for number, character in enumerate(CHARACTERS)}


def encode(text: str) -> list[int]:
    """Character ids of normalised text, with the leading space every target starts with.

    Raises:
        VocabularyError: the text holds a character outside `CHARACTERS`.
    """
    try:
        return [_IDS[character] for character in " " + text]
    except KeyError as error:
        raise VocabularyError(f"{error.args[0]!r} is not in the demo vocabulary; normalise the text first.") from error


def decode(ids: list[int]) -> str:
    """Text of character ids; special ids are left out, and so is the leading space."""
    return "".join(CHARACTERS[number] for number in ids if number < END_OF_TEXT).strip()


def write_tokenizer(directory: Path, whisper: bool) -> None:
    """Write the vocabulary as a byte-level BPE without merges, loadable as a Whisper or a GPT-2 tokenizer.

    Args:
        directory: where the files go; must exist.
        whisper: True adds Whisper's special tokens after the shared ids.
    """
    specials = _WHISPER_SPECIALS if whisper else _TEXT_SPECIALS
    vocabulary = {character.replace(" ", _SPACE_SYMBOL): number for character, number in _IDS.items()}
    vocabulary["<|endoftext|>"] = END_OF_TEXT
    added = {token: END_OF_TEXT + offset for offset, token in enumerate(specials)}
    _write_json(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    _write_json(directory / "tokenizer.json", _tokenizer_description(vocabulary, added, whisper))
    _write_json(directory / "tokenizer_config.json", _tokenizer_settings(added, whisper))


def _added_token(token: str) -> dict[str, Any]:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _tokenizer_description(vocabulary: dict[str, int], added: dict[str, int], whisper: bool) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, **_added_token(token)} for token, number in added.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": _whisper_template(added) if whisper else None,
        "decoder": byte_level,
        "model": model,
    }


def _whisper_template(added: dict[str, int]) -> dict[str, Any]:
    before = ["<|startoftranscript|>", "<|notimestamps|>"]
    after = ["<|endoftext|>"]

    def special(token: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def template(*sequences: str) -> list[dict[str, Any]]:
        middle = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        return [*map(special, before), *middle, *map(special, after)]

    names = before + after
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {name: {"id": name, "ids": [added[name]], "tokens": [name]} for name in names},
    }


def _tokenizer_settings(added: dict[str, int], whisper: bool) -> dict[str, Any]:
    end = "<|endoftext|>"
    return {
        "tokenizer_class": "WhisperTokenizer" if whisper else "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 448,
        "added_tokens_decoder": {str(number): _added_token(token) for token, number in added.items()},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
