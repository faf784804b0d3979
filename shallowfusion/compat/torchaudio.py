"""torchaudio's CTC decoder on the lexicon search of this library: change one import.

    from shallowfusion.compat.torchaudio import ctc_decoder

Scores, words, tokens and time steps are those of torchaudio with flashlight-text. Differences: language models are ARPA
files (plain or .gz), not KenLM binaries or Python classes; a batch runs on threads; emissions may be of any float dtype
on any device; where scores are equal another hypothesis may come first; without a lexicon the language model
scores each label as itself (flashlight-text numbers them anew, in no order, unless `lm_dict` lists them); emissions
with NaN are an error, in a batch logged, and their utterance has no hypotheses. Not here: `CTCDecoderLM` and
`CTCDecoderLMState` (language models written in Python; fuse those with `CTCDecoder` and `fusion.delayed`),
`download_pretrained_files`, and `cuda_ctc_decoder` (`CTCDecoder` searches on the GPU, see `CtcOptions.backend`).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shallowfusion.config import require
from shallowfusion.ctc.lexicon import LexiconOptions, LexiconResult, LexiconSearch, LexiconWords
from shallowfusion.errors import InvalidArgumentError, ModelError, VocabularyError
from shallowfusion.ngrams.arpa import is_arpa
from shallowfusion.ngrams.table import NgramTable

__all__ = ["CTCDecoder", "CTCHypothesis", "ctc_decoder"]

logger = logging.getLogger(__name__)

LOG_10 = math.log(10.0)


class CTCHypothesis(NamedTuple):
    """One hypothesis.

    Args:
        tokens: int64 [tokens], without blanks and repeats; silence at both ends.
        words: of the lexicon; empty without one.
        score: what hypotheses are ranked by; the language model's log-probs count in base 10.
        timesteps: int32 [tokens], the frame of each token's first label; the silence before the first frame is 0.
    """

    tokens: Tensor
    words: list[str]
    score: float
    timesteps: Tensor


class CTCDecoder:
    """Beam search over the frames of a CTC model; made by `ctc_decoder`.

    Args:
        search: a search that has seen no frame.
        tokens: text of each label.
        words: of the lexicon, by number.
        nbest: hypotheses returned.
        blank: label.
    """

    def __init__(
        self, search: LexiconSearch, tokens: Sequence[str], words: Sequence[str], nbest: int, blank: int
    ) -> None:
        self.nbest, self.blank = nbest, blank
        self._fresh, self._tokens, self._words = search, tuple(tokens), tuple(words)
        self._search = search.again()

    def __call__(self, emissions: Tensor, lengths: Tensor | None = None) -> list[list[CTCHypothesis]]:
        """Decode a batch.

        Args:
            emissions: [utterances, frames, labels], log-probs or other scores to be added.
            lengths: int [utterances], frames of each, None = all.

        Returns:
            Up to `nbest` hypotheses per utterance, best first; none of one with NaN, which is logged.

        Raises:
            InvalidArgumentError: another shape.
        """
        scores = _scores(emissions, 3)
        counts = [scores.shape[1]] * len(scores) if lengths is None else [int(count) for count in lengths]
        require(
            len(counts) == len(scores) and all(0 <= count <= scores.shape[1] for count in counts),
            f"lengths must be one per utterance, from 0 to {scores.shape[1]}, got {counts}.",
        )
        with ThreadPoolExecutor(max_workers=max(1, min(len(scores), os.cpu_count() or 1))) as pool:
            frames = [own[:count] for own, count in zip(scores, counts, strict=True)]
            return list(pool.map(self._decode, range(len(frames)), frames))

    def decode_begin(self) -> None:
        """Start an utterance that comes piece by piece."""
        self._search = self._fresh.again()

    def decode_step(self, emissions: Tensor) -> None:
        """Go on by [frames, labels]; pieces of any size give what one gives."""
        self._search.step(_scores(emissions, 2))

    def decode_end(self) -> None:
        """Close the utterance."""
        self._search.end()

    def get_final_hypothesis(self) -> list[CTCHypothesis]:
        """Up to `nbest` hypotheses, best first."""
        return [self._hypothesis(result) for result in self._search.results()[: self.nbest]]

    def idxs_to_tokens(self, idxs: Tensor) -> list[str]:
        """Text of each label."""
        return [self._tokens[int(i)] for i in idxs]

    def _decode(self, utterance: int, scores: npt.NDArray[np.float32]) -> list[CTCHypothesis]:
        if np.isnan(scores).any():
            logger.error("utterance %d was not decoded: its emissions hold NaN; the model overflowed.", utterance)
            return []
        search = self._fresh.again()
        search.step(scores)
        search.end()
        return [self._hypothesis(result) for result in search.results()[: self.nbest]]

    def _hypothesis(self, result: LexiconResult) -> CTCHypothesis:
        labels = result.labels.tolist()
        changes = [
            (frame, label)
            for frame, (before, label) in enumerate(itertools.pairwise([-1, *labels]))
            if label not in (before, self.blank)
        ]
        return CTCHypothesis(
            tokens=torch.tensor([label for _, label in changes], dtype=torch.int64),
            words=[self._words[word] for word in result.words],
            score=result.score,
            timesteps=torch.tensor([frame for frame, _ in changes], dtype=torch.int32),
        )


def ctc_decoder(
    lexicon: str | Path | None,
    tokens: str | Path | Sequence[str],
    lm: str | Path | NgramTable | None = None,
    lm_dict: str | Path | None = None,
    nbest: int = 1,
    beam_size: int = 50,
    beam_size_token: int | None = None,
    beam_threshold: float = 50,
    lm_weight: float = 2,
    word_score: float = 0,
    unk_score: float = -math.inf,
    sil_score: float = 0,
    log_add: bool = False,
    blank_token: str = "-",
    sil_token: str = "|",
    unk_word: str = "<unk>",
) -> CTCDecoder:
    """A decoder for a CTC model's labels; names and defaults are torchaudio's.

    Args:
        lexicon: file of lines "word label label ..."; a word may have several. None = no words: the labels are what
            the language model scores.
        tokens: the labels, or a file with one a line; further names on a line stand for the same label.
        lm: ARPA file (.arpa, .arpa.gz) or table, of words with a lexicon, else of labels; None = none.
        lm_dict: file of the words the language model may say, one a line; the lexicon's must be among them.
        nbest, beam_size: hypotheses returned, and alignments kept after each frame.
        beam_size_token: labels looked at in each frame, None = all.
        beam_threshold: alignments that lie more below the best are dropped.
        lm_weight: of log-probs in base 10.
        word_score, unk_score, sil_score: added for a word of the lexicon, a word outside it, a frame of silence.
        log_add: sum alignments that meet; False keeps the best.
        blank_token, sil_token: labels.
        unk_word: what stands for a word outside the lexicon.

    Raises:
        InvalidArgumentError: a number out of range.
        ModelError: a file cannot be read.
        VocabularyError: a spelling holds something else than labels, or blank or silence is no label.
    """
    names = [[token] for token in tokens] if not isinstance(tokens, (str, Path)) else _lines(tokens)
    numbers = {name: label for label, own in enumerate(names) for name in own}
    table = lm if isinstance(lm, NgramTable) or lm is None else _table(lm)
    options = LexiconOptions(
        beam_size=beam_size,
        top_labels=beam_size_token,
        beam_margin=beam_threshold,
        lm_weight=lm_weight,
        lm_scale=1.0 / LOG_10,
        word_score=word_score,
        unknown_score=unk_score,
        silence_score=sil_score,
        log_add=log_add,
    )
    require(isinstance(nbest, int) and nbest >= 1, f"nbest must be an integer of at least 1, got {nbest!r}.")
    blank, silence = (_label(name, numbers) for name in (blank_token, sil_token))
    spelled = None if lexicon is None else _lexicon(lexicon, numbers)
    words = list(spelled) if spelled is not None else [own[0] for own in names]
    if lm_dict is not None:
        _check_words(words, lm_dict)
    unknown = words.index(unk_word) if unk_word in words else len(words)
    if unknown == len(words):
        words.append(unk_word)
    ids = [0 if table is None else table.model.id_of(word) for word in words]
    spellings = None if spelled is None else [spelled.get(word, []) for word in words]
    search = LexiconSearch(len(names), blank, silence, LexiconWords(spellings, ids, unknown), options, table)
    return CTCDecoder(search, [own[0] for own in names], words, nbest, blank)


def _scores(emissions: Tensor, axes: int) -> npt.NDArray[np.float32]:
    if not (isinstance(emissions, Tensor) and emissions.is_floating_point() and emissions.dim() == axes):
        got = (
            f"{emissions.dtype} {list(emissions.shape)}" if isinstance(emissions, Tensor) else type(emissions).__name__
        )
        wanted = "[utterances, frames, labels]" if axes == 3 else "[frames, labels]"
        raise InvalidArgumentError(f"emissions must be a float tensor {wanted}, got {got}.")
    array: npt.NDArray[np.float32] = emissions.detach().float().cpu().contiguous().numpy()
    return array


def _lines(path: str | Path) -> list[list[str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read as text ({error}); give a file or a list.") from error
    return [line.split() for line in text.splitlines() if line.strip()]


def _lexicon(path: str | Path, numbers: dict[str, int]) -> dict[str, list[list[int]]]:
    """Spellings of each word, in the order of the file."""
    found: dict[str, list[list[int]]] = {}
    for word, *spelling in _lines(path):
        strange = [label for label in spelling if label not in numbers]
        if strange or not spelling:
            raise VocabularyError(
                f"{path} spells {word!r} as {' '.join(spelling)!r}, wanted labels: "
                + (f"{strange[0]!r} is none." if strange else "there are none.")
            )
        found.setdefault(word, []).append([numbers[label] for label in spelling])
    if not found:
        raise ModelError(f"{path} holds no words; give lines such as 'word w o r d |', or lexicon=None.")
    return found


def _check_words(words: Sequence[str], path: str | Path) -> None:
    known = {line[0] for line in _lines(path)}
    missing = [word for word in words if word not in known]
    if missing:
        raise VocabularyError(
            f"{path} lacks {len(missing)} words of the lexicon, the first is {missing[0]!r}; add them."
        )


def _label(name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        raise VocabularyError(f"{name!r} is not among the tokens; name the blank and the silence as the tokens do.")
    return numbers[name]


def _table(path: str | Path) -> NgramTable:
    if not is_arpa(path):
        raise ModelError(f"{path} is no .arpa or .arpa.gz file; KenLM binaries are not read, give the ARPA file.")
    return NgramTable.from_arpa(path)
