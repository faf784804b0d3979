"""The vocabulary in order of bytes against a scan of all tokens."""

from __future__ import annotations

import random

import pytest

from shallowfusion.text.byte_order import ByteOrder


def with_prefix(tokens: list[bytes | None], prefix: bytes) -> list[int]:
    return sorted(i for i, token in enumerate(tokens) if token and token.startswith(prefix))


@pytest.mark.parametrize("seed", range(5))
def test_prefix_ranges_hold_the_tokens_a_scan_finds(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = [0x00, 0x61, 0x62, 0xFE, 0xFF]
    tokens: list[bytes | None] = [bytes(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(200)]
    tokens[3] = tokens[70] = None
    tokens[5] = b""
    order = ByteOrder(tokens)
    assert sorted(order.order.tolist()) == list(range(200))
    for _ in range(300):
        prefix = bytes(rng.choices(alphabet, k=rng.randint(0, 5)))
        first, last = order.prefix_range(prefix)
        assert sorted(order.order[first:last].tolist()) == with_prefix(tokens, prefix)
        assert list(order.tokens_of(prefix)) == (
            [i for i, token in enumerate(tokens) if token == prefix] if prefix else []
        )


def test_prefixes_of_ff_run_to_the_end_of_the_texts() -> None:
    tokens = [b"\xff\xff", b"a", None, b"\xff"]
    order = ByteOrder(tokens)
    assert with_prefix(tokens, b"\xff") == sorted(order.order[slice(*order.prefix_range(b"\xff"))].tolist())
    assert order.order[-1] == 2
    assert order.places[order.order].tolist() == [0, 1, 2, 3]


def test_missing_bytes_are_those_without_a_token_of_their_own() -> None:
    order = ByteOrder([bytes([i]) for i in range(256) if i != 7] + [b"\x07\x07"])
    assert order.missing_bytes() == {7}


def test_a_vocabulary_without_text_has_no_ranges() -> None:
    order = ByteOrder([None, b""])
    assert order.prefix_range(b"") == (0, 0)
    assert order.prefix_range(b"a") == (0, 0)
    assert order.tokens_of(b"a") == ()
