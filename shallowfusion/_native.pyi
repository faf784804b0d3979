"""Types of the C++ extension; only the faces of native classes import it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Beam state ---------------------------------------------------------------------------------------------------------

class BeamState:
    def __init__(
        self,
        *,
        beam_size: int,
        end_ids: Sequence[int],
        max_new_tokens: int,
        stop_rule: str,
        length_penalty: float | None,
        early_stopping: str,
        patience: float,
        recombination: str,
        num_utterances: int,
        num_parts: int,
    ) -> None: ...
    @property
    def num_nodes(self) -> int: ...
    def advance(
        self,
        *,
        utterances: npt.NDArray[np.int64],
        totals: npt.NDArray[np.float32],
        parents: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        parts: npt.NDArray[np.float32],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.bool_]]: ...
    def results(self, *, utterance: int, n_best: int) -> list[dict[str, Any]]: ...
    def force_finish(self, *, utterance: int) -> None: ...
    def release(self, *, utterance: int) -> None: ...
    def is_done(self, *, utterance: int) -> bool: ...
    def num_live(self, *, utterance: int) -> int: ...
    def num_finished(self, *, utterance: int) -> int: ...

# Beam mirror --------------------------------------------------------------------------------------------------------

class BeamMirror:
    def __init__(
        self,
        *,
        beam_size: int,
        end_ids: Sequence[int],
        max_new_tokens: int,
        stop_rule: str,
        length_penalty: float | None,
        early_stopping: str,
        patience: float,
        num_utterances: int,
        num_candidates: int,
        num_parts: int,
    ) -> None: ...
    @property
    def num_steps(self) -> int: ...
    def replay(self, *, entry: npt.NDArray[np.int32]) -> None: ...
    def results(self, *, utterance: int, n_best: int) -> list[dict[str, Any]]: ...
    def force_finish(self, *, utterance: int) -> None: ...
    def is_done(self, *, utterance: int) -> bool: ...
    def saw_nan(self, *, utterance: int) -> bool: ...
    def hash(self, *, utterance: int) -> int: ...

# Page pool ----------------------------------------------------------------------------------------------------------

class PagePool:
    def __init__(self, *, num_pages: int, page_size: int) -> None: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    @property
    def high_water(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    def create(self) -> int: ...
    def fork(self, *, sequence: int) -> int: ...
    def release(self, *, sequence: int) -> None: ...
    def append(self, *, sequence: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...
    def append_each(self, *, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]: ...
    def reorder(self, *, sequences: npt.NDArray[np.int64], parents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
    def visibility(self, *, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]: ...
    def length(self, *, sequence: int) -> int: ...
    def slots(self, *, sequence: int) -> npt.NDArray[np.int32]: ...
    def pages(self, *, sequence: int) -> npt.NDArray[np.int32]: ...

# ARPA reader --------------------------------------------------------------------------------------------------------

NgramArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]

def read_arpa(*, text: bytes) -> tuple[list[bytes], list[NgramArrays]] | None: ...

# N-gram table -------------------------------------------------------------------------------------------------------

class WordTable: ...

class AskedTable(WordTable):
    # score(state, word) -> (log-prob, state after it)
    def __init__(
        self,
        *,
        score: Callable[[int, int], tuple[float, int]],
        end: Callable[[int], float],
        num_words: int,
        unknown_word: int,
    ) -> None: ...

class NgramTable(WordTable):
    def __init__(
        self,
        *,
        num_words: int,
        orders: Sequence[NgramArrays],
        begin_word: int,
        end_word: int,
        unknown_word: int,
    ) -> None: ...
    @property
    def start_state(self) -> int: ...
    @property
    def null_state(self) -> int: ...
    @property
    def num_words(self) -> int: ...
    @property
    def num_states(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def order(self) -> int: ...
    def score(
        self, *, states: npt.NDArray[np.int64], words: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]: ...
    def end(self, *, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def dense(self, *, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def arrays(
        self,
    ) -> tuple[
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.uint32],
        npt.NDArray[np.float32],
        npt.NDArray[np.float32],
    ]: ...

# Phrase automaton ---------------------------------------------------------------------------------------------------

class PhraseAutomaton:
    def __init__(
        self,
        *,
        tokens: npt.NDArray[np.int32],
        credits: npt.NDArray[np.float64],
        offsets: npt.NDArray[np.int64],
        phrases: npt.NDArray[np.int64],
        classes: npt.NDArray[np.uint8],
    ) -> None: ...
    @property
    def start_state(self) -> int: ...
    @property
    def num_states(self) -> int: ...
    def step(
        self, *, states: npt.NDArray[np.int64], shared_first: bool
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32]]: ...
    def advance(self, *, states: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...
    def refunds(self, *, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def held(self, *, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def closing(self, *, states: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]: ...
    def say(
        self, *, states: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]: ...
    def ends_words(self, *, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]: ...
    def turns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]: ...

# Fused step ---------------------------------------------------------------------------------------------------------

# (address, dtype code, vocabulary, row stride, temperature, map or None, policy code, floor)
Source = tuple[int, int, int, int, float, npt.NDArray[Any] | None, int, float]

def fused_step(
    *,
    sources: Sequence[Source],
    weights: npt.NDArray[Any],
    totals: npt.NDArray[Any],
    beam_size: int,
    top_k: int,
    end_id: int,
    token_bias: npt.NDArray[Any] | None,
    allowed: npt.NDArray[Any] | None,
    bonus: tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]] | None,
    length_bonus: npt.NDArray[Any],
    combine: str,
    normalize: str,
    level: str | None,
    threads: int | None,
) -> dict[str, Any]: ...
def row_statistics(*, source: Source, rows: int, level: str | None, threads: int | None) -> dict[str, Any]: ...
def fused_step_levels() -> list[str]: ...
def range_log_probs(
    *,
    logits: tuple[int, int, int, int, int],
    temperature: float,
    order: npt.NDArray[Any] | None,
    row_offsets: npt.NDArray[Any],
    first: npt.NDArray[Any],
    last: npt.NDArray[Any],
    log_sums: npt.NDArray[Any] | None,
    level: str | None,
    threads: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], str]: ...

# dtype codes as in the fused step; addresses of dense memory
def round_rows(*, values: int, dtype: int, rows: int, columns: int, whole: int, scales: int, threads: int) -> None: ...
def scale_rows(
    *, product: int, scales: int, bias: int, rows: int, columns: int, output: int, dtype: int, threads: int
) -> None: ...
def has_int8_product() -> bool: ...
def has_int8_tiles() -> bool: ...
def packed_int8_size(*, outputs: int, inputs: int) -> int: ...
def pack_int8(*, weights: int, outputs: int, inputs: int, packed: int) -> None: ...
def int8_product(
    *,
    values: int,
    dtype: int,
    packed: int,
    scales: int,
    bias: int,
    output: int,
    output_dtype: int,
    rows: int,
    inputs: int,
    outputs: int,
    threads: int,
) -> None: ...
def prefer_huge_pages(*, memory: int, bytes: int) -> None: ...
def has_tile_product() -> bool: ...
def packed_tiles_size(*, outputs: int, inputs: int) -> int: ...
def pack_tiles(*, weights: int, outputs: int, inputs: int, packed: int) -> None: ...
def tile_product(
    *, values: int, packed: int, bias: int, output: int, rows: int, inputs: int, outputs: int, threads: int
) -> None: ...

# strides of utterances, positions and heads in elements; sizes: utterances, queries, heads, key heads, frames, dim
def frame_attention(
    *,
    query: int,
    query_strides: tuple[int, int, int],
    keys: int,
    key_strides: tuple[int, int, int],
    values: int,
    value_strides: tuple[int, int, int],
    dtype: int,
    output: int,
    lengths: int,
    starts: int,
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    level: str | None,
    threads: int,
) -> None: ...

# CTC search ---------------------------------------------------------------------------------------------------------

class CtcLexicon:
    # (spelling, id in the table, the sets of known words it is in, a bit each)
    def __init__(self, *, words: Sequence[tuple[str, int, int]]) -> None: ...

class CtcLanguage:
    weight: float
    word_bonus: float
    label_bonus: float
    unknown_word: float
    unknown_prefixes: list[float]
    score_end: bool
    score_empty_word: bool
    hotword_weight: float
    def __init__(self) -> None: ...
    def set_table(self, *, table: WordTable, lexicon: CtcLexicon | None) -> None: ...
    def set_hotwords(self, *, words: CtcLexicon) -> None: ...
    def set_phrases(self, *, phrases: PhraseAutomaton) -> None: ...

class CtcRules:
    use_max: bool
    token_min_log_prob: float
    top_labels: int
    beam_margin: float
    blank_skip_log_prob: float
    rank_paths: bool
    history_words: int
    merge_texts: bool
    last_times: bool
    def __init__(self, *, blank: int, delimiter: int, beam_size: int) -> None: ...

class CtcSearch:
    # labels: (text, begins a word, ends a word, its word in a label-level table)
    def __init__(
        self, *, labels: Sequence[tuple[str, bool, bool, int]], rules: CtcRules, language: CtcLanguage
    ) -> None: ...
    def begin(self, *, start_states: Sequence[int]) -> CtcState: ...

class CtcState:
    @property
    def num_frames(self) -> list[int]: ...
    @property
    def num_prefixes(self) -> list[int]: ...
    def step(self, *, log_probs: npt.NDArray[Any], counts: npt.NDArray[np.int64], threads: int) -> None: ...
    # per utterance (text, is open, extra) of each prefix in the beam
    def live(self) -> list[list[tuple[str, bool, float]]]: ...
    def set_extras(self, *, extras: list[list[float]]) -> None: ...
    # per utterance: error, and per hypothesis (text, labels, label frames, word frames, total, asr, lm, state, extra)
    def results(self, *, n_best: int, ended: bool, threads: int) -> list[tuple[str, list[tuple[Any, ...]]]]: ...

# Lexicon search -----------------------------------------------------------------------------------------------------

class SpellingTrie:
    # (word, labels, score)
    def __init__(
        self, *, spellings: Sequence[tuple[int, Sequence[int], float]], num_labels: int, num_words: int
    ) -> None: ...

class LexiconSearch:
    def __init__(
        self,
        *,
        num_labels: int,
        blank: int,
        silence: int,
        beam_size: int,
        top_labels: int,
        beam_margin: float,
        lm_weight: float,
        lm_scale: float,
        word_score: float,
        unknown_score: float,
        silence_score: float,
        log_add: bool,
        trie: SpellingTrie | None,
        unknown_word: int,
        table: Any,
        ids: Sequence[int],
        transitions: npt.NDArray[np.float32] | None = None,
    ) -> None: ...
    def step(self, *, emissions: npt.NDArray[np.float32]) -> None: ...
    def end(self) -> None: ...
    def results(self) -> list[tuple[float, list[int], list[int]]]: ...
    @property
    def num_frames(self) -> int: ...

# CTC prefix scores --------------------------------------------------------------------------------------------------

class CtcPrefixScores:
    def __init__(
        self,
        *,
        log_probs: npt.NDArray[np.float32],
        counts: npt.NDArray[np.int64],
        blank: int,
        delimiter: int,
        cut: float,
        threads: int,
    ) -> None: ...
    @property
    def num_utterances(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def scores(self, *, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]: ...
    def follow(self, *, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None: ...
    def keep(self, *, order: npt.NDArray[np.int64]) -> None: ...
