"""What each token id of a model means, and whether two models mean the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from shallowfusion.errors import VocabularyError

__all__ = ["Vocabulary", "byte_alphabet", "class_factors", "text_map", "token_bytes", "token_map", "vocabulary_of"]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Args:
        tokens: the bytes of each text token; None for special tokens and ids without text.
        end_id: the token that ends an utterance.
        begin_id: the token a language model starts from; None for acoustic models.
        name: shown in errors.
    """

    tokens: tuple[bytes | None, ...]
    end_id: int
    begin_id: int | None = None
    name: str = "vocabulary"

    def __len__(self) -> int:
        return len(self.tokens)

    def __hash__(self) -> int:
        return hash(self.fingerprint)  # remembered, where the hash of 50,000 tokens is not

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every token's bytes and the end token's id."""
        digest = hashlib.sha256(str(self.end_id).encode())
        for token in self.tokens:
            digest.update(b"\xff\xff" if token is None else len(token).to_bytes(2, "little") + token)
        return digest.hexdigest()


def vocabulary_of(tokenizer: Any, size: int, end_id: int, begin_id: int | None = None, name: str = "") -> Vocabulary:
    """Read a transformers tokenizer; ids from its length up to `size` hold no text."""
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    byte_of = byte_alphabet()
    tokens = [None if i in special or t is None else token_bytes(t, byte_of) for i, t in enumerate(names)]
    tokens += [None] * (size - len(tokens))
    return Vocabulary(tuple(tokens), end_id, begin_id, name or str(getattr(tokenizer, "name_or_path", "vocabulary")))


@lru_cache(maxsize=64)
def token_map(acoustic: Vocabulary, language: Vocabulary, include_end: bool) -> Tensor | None:
    """The language model's id of each acoustic token, once both are proved to cut text into the same tokens.

    Every text token of either must be one of the other: a language model with longer tokens beside the acoustic ones
    (byte pairs beside letters) never reads text that is cut into the short ones, and would say nonsense of it.

    Remembered: every search asks, and 50,000 tokens take a tenth of a second. The answer is not to be written to.

    Args:
        include_end: whether the acoustic end token corresponds to the language model's end token.

    Returns:
        int32 [acoustic size], -1 for tokens without counterpart; None if ids agree wherever both models have them.

    Raises:
        VocabularyError: a text token of one model is missing from the other.
    """
    by_bytes: dict[bytes, int] = {}
    for i, token in enumerate(language.tokens):
        if token is not None:
            by_bytes.setdefault(token, i)
    ids = []
    for i, token in enumerate(acoustic.tokens):
        same = i < len(language) and token is not None and language.tokens[i] == token
        ids.append(i if same else -1 if token is None else by_bytes.get(token, -2))
    missing = [i for i, target in enumerate(ids) if target == -2]
    moved = [i for i, target in enumerate(ids) if target >= 0 and target != i]
    if missing:
        raise VocabularyError(_difference(acoustic, language, missing, moved))
    known = {token for token in acoustic.tokens if token is not None}
    foreign = [i for i, token in enumerate(language.tokens) if token is not None and token not in known]
    if foreign:
        raise VocabularyError(
            f"the language model ({language.name}) has {len(foreign)} text tokens that the acoustic model "
            f"({acoustic.name}) has not, the first is id {foreign[0]}, {language.tokens[foreign[0]]!r}; it cuts text "
            f"otherwise and cannot score the acoustic tokens. {_CURE}"
        )
    if include_end:
        ids[acoustic.end_id] = language.end_id
    shared = min(len(acoustic), len(language))
    if ids == [*range(shared), *[-1] * (len(ids) - shared)]:
        return None
    return torch.tensor(ids, dtype=torch.int32)


def text_map(vocabulary: Vocabulary) -> Tensor:
    """A model's own ids for its text tokens, -1 for the end and special tokens; int32 [size]."""
    ids = [-1 if token is None or i == vocabulary.end_id else i for i, token in enumerate(vocabulary.tokens)]
    return torch.tensor(ids, dtype=torch.int32)


def class_factors(vocabulary: Vocabulary, factors: Mapping[str, float]) -> Tensor:
    """Product of the factors of every class each token belongs to, float [size].

    Args:
        factors: by class: end; timestamps (all other tokens without text); digits (nothing but digits, spaces apart);
            word_initial (begins with a space, and is more than that).
    """
    product = torch.ones(len(vocabulary))
    if factors:
        for name, members in _classes(vocabulary).items():
            product[members] *= factors.get(name, 1.0)
    return product


@lru_cache(maxsize=16)
def _classes(vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Which tokens belong to each class, bool [size]."""
    texts = [token if i != vocabulary.end_id else None for i, token in enumerate(vocabulary.tokens)]
    members = {
        "timestamps": [token is None for token in texts],
        "digits": [token is not None and token.strip().isdigit() for token in texts],
        "word_initial": [token is not None and token.startswith(b" ") and bool(token.strip()) for token in texts],
    }
    found = {name: torch.tensor(own) for name, own in members.items()}
    found["end"] = torch.arange(len(texts)) == vocabulary.end_id
    found["timestamps"] &= ~found["end"]
    return found


_CURE = (
    "Wanted equal tokenizers: English-only Whisper (*.en) goes with GPT-2; other pairs need fusion.delayed(weight), "
    'which re-tokenises the text, lm_bridge="bytes", or a language model trained on the acoustic model\'s tokenizer.'
)


def _difference(acoustic: Vocabulary, language: Vocabulary, missing: Sequence[int], moved: Sequence[int]) -> str:
    first = (sorted([*missing, *moved]) or [0])[0]
    theirs = language.tokens[first] if first < len(language) else None
    return (
        f"the acoustic model's tokens ({acoustic.name}) are not those of the language model ({language.name}): "
        f"{len(missing)} of {sum(t is not None for t in acoustic.tokens)} text tokens have no counterpart and "
        f"{len(moved)} have another id; first difference: id {first} is {acoustic.tokens[first]!r} against {theirs!r}. "
        f"{_CURE}"
    )


def token_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    """Bytes of a byte-level BPE token; SentencePiece pieces keep their UTF-8, the space mark as a space."""
    if all(character in byte_of for character in token):
        return bytes(byte_of[character] for character in token)
    if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
