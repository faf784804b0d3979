"""The lexicon of the device search against beginnings of words in a dictionary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowfusion.ctc.device_lexicon import OUTSIDE, ROOT, DeviceLexicon, WordTree
from shallowfusion.ctc.settings import CtcAlphabet, CtcLanguage, CtcOptions
from tests.ctc.test_language import random_table

ALPHABET = CtcAlphabet(("_", "|", "a", "b", "ab", "éa", "é", "ba"), delimiter=1)
CPU = torch.device("cpu")
WORDS = st.lists(st.text("abé𝄞", min_size=1, max_size=5), max_size=8)


def node_of(tree: WordTree, text: str) -> int:
    state = ROOT
    for letter in text:
        state = int(tree.say([state], [ord(letter)])[1][0])
    return state


@settings(max_examples=150, deadline=None)
@given(WORDS, st.lists(st.text("abé𝄞x", max_size=6), max_size=8))
def test_a_tree_holds_the_beginnings_of_its_words(words: list[str], texts: list[str]) -> None:
    tree = WordTree(words)
    beginnings = {word[:length] for word in words for length in range(1, len(word) + 1)}
    assert len(tree.parents) == 2 + len(beginnings)
    for text in [*texts, *beginnings]:
        node = node_of(tree, text)
        assert (node == OUTSIDE) == (text != "" and text not in beginnings)
        if text in beginnings:
            assert tree.parents[node] == node_of(tree, text[:-1])
    assert tree.ends.tolist() == [node_of(tree, word) for word in words]
    nodes = {node_of(tree, text): text for text in beginnings}
    fallbacks, offsets, letters = tree.turns()
    for node, text in nodes.items():
        own = [chr(letter) for letter in letters[offsets[node] : offsets[node + 1]]]
        assert own == sorted({other[len(text)] for other in beginnings if other[:-1] == text})
        assert fallbacks[node] == OUTSIDE
    assert (fallbacks[ROOT], offsets[2]) == (ROOT, 0)


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(0, 6), st.booleans(), st.booleans())
def test_nodes_are_worth_what_their_words_are(words: list[str], seed: int, with_lm: bool, with_sets: bool) -> None:
    hotwords = tuple(dict.fromkeys(words))
    options = CtcOptions(hotwords=hotwords, hotword_form="words", hotword_weight=3.0, word_bonus=0.5, lm_weight=0.4)
    sets = ((("ab", "abab"), -3.0), (("b", "ba"), 1.0))
    table = random_table(seed)
    language = CtcLanguage(table, words=("ab", "b"), prefixes=sets if with_sets else ()) if with_lm else None
    lexicon = DeviceLexicon(ALPHABET, options, language, CPU)
    names = [word for word in table.model.words if word not in ("<s>", "</s>", "<unk>")] if with_lm else []
    known_sets = [set(own) for own, _ in sets] if with_sets else [{"ab", "b"}]
    nats = [value for _, value in sets] if with_sets else [-10.0]
    tree = WordTree([*hotwords, *names])
    beginnings = {word[:length] for word in (*hotwords, *names) for length in range(1, len(word) + 1)}
    for text in [*beginnings, "bbbbbb"]:
        node = node_of(tree, text)
        is_known = any(text in own and text in names for own in known_sets)
        unknown_word = -10 * math.log(10) * 0.4 if with_lm and not is_known else 0.0
        gain = 0.5 + 3.0 * (text in hotwords) + unknown_word
        assert float(lexicon.gains[node]) == pytest.approx(gain)
        longer = [len(word) for word in hotwords if word.startswith(text)]
        assert float(lexicon.shares[node]) == pytest.approx(3.0 / min(longer) if longer else 0.0)
        lacking = [
            value
            for own, value in zip(known_sets, nats, strict=True)
            if not any(word.startswith(text) for word in own & set(names))
        ]
        assert float(lexicon.unknown[node]) == pytest.approx(sum(lacking) if with_lm and not longer else 0.0)
        if with_lm:
            wanted = table.model.ids[text] if text in names else table.model.unknown_word
            assert int(lexicon.language_words[node]) == wanted


@settings(max_examples=100, deadline=None)
@given(WORDS)
def test_labels_lead_from_beginnings_to_beginnings(words: list[str]) -> None:
    hotwords = tuple(dict.fromkeys(words))
    options = CtcOptions(hotwords=hotwords, hotword_form="words")
    lexicon, tree = DeviceLexicon(ALPHABET, options, None, CPU), WordTree(hotwords)
    texts = {"": ROOT, "xx": OUTSIDE}
    texts |= {word[:n]: node_of(tree, word[:n]) for word in words for n in range(1, len(word) + 1)}
    for text, node in texts.items():
        for label, piece in enumerate(ALPHABET.pieces):
            gains, after = lexicon.table.look(torch.tensor([node]), torch.tensor([label]))
            assert (float(gains), int(after)) == (0.0, texts.get(text + piece.text, OUTSIDE))
