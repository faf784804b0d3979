"""torchaudio's lexicon decoder: our front against flashlight-text, the library behind the original.

A lexicon of 26,000 words and a word 3-gram, as people use it; the utterances are those of `bench.ctc_batch`.
"""

from __future__ import annotations

import gzip
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.ctc import DATA, optional
from bench.ctc_batch import BLANK, LABELS, utterances
from bench.timing import Measurement, measurements, take_turns
from shallowfusion.compat.torchaudio import ctc_decoder

__all__ = ["run"]

TOKENS = ["|", *LABELS[1:BLANK], "-"]  # the same columns, named as torchaudio names them
THRESHOLD = 25.0
SCORE_TOLERANCE = 1e-2
Decode = Callable[[np.ndarray], tuple[float, list[str]]]


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """CPU time of one thread, beams 50 and 500, without and with the language model; scores are compared first."""
    if optional("flashlight.lib.text.decoder") is None:
        print("ctc_lexicon: flashlight-text is not installed (pip install flashlight-text); nothing is measured")
        return
    data = utterances(2 if quick else 10)
    with tempfile.TemporaryDirectory() as folder:
        lexicon, arpa = files(Path(folder))
        for beam_size in (50,) if quick else (50, 500):
            for lm in (None, arpa):
                decoders = {"ours": ours(lexicon, lm, beam_size), "flashlight-text": flashlight(lexicon, lm, beam_size)}
                yield compare(decoders, data, beam_size, lm is not None, 1 if quick else 5)


def compare(
    decoders: dict[str, Decode], data: Sequence[np.ndarray], beam_size: int, with_lm: bool, repeats: int
) -> list[Measurement]:
    own, theirs = decoders.values()
    worse = [i for i, one in enumerate(data) if own(one)[0] < theirs(one)[0] - SCORE_TOLERANCE]
    if worse:
        raise AssertionError(f"our scores of utterances {worse} are below flashlight's at beam {beam_size}.")
    calls = {name: lambda decode=decode: [decode(one) for one in data] for name, decode in decoders.items()}
    seconds = take_turns(calls, repeats, warm_up=0, clock=time.process_time)  # type: ignore[arg-type]
    kind = "word 3-gram of 200003 words" if with_lm else "no LM"
    shape = f"libri twice, noisy: {len(data)} of 15 s, lexicon, beam={beam_size} threshold={THRESHOLD}, {kind}"
    notes = dict.fromkeys(calls, "CPU time of one thread; no best score of ours is below theirs")
    return measurements("ctc_lexicon", shape, "float32", seconds, "ours", note=notes)


def files(folder: Path) -> tuple[Path, Path]:
    """The stored lexicon without words of other letters, and the language model."""
    known = set(TOKENS)
    lines = gzip.decompress((DATA / "flashlight" / "words.lst.gz").read_bytes()).decode().splitlines()
    lexicon = folder / "lexicon.txt"
    kept = [" ".join(line.split()) for line in lines if line.split() and set(line.split()[1:]) <= known]
    lexicon.write_text("\n".join(kept) + "\n", encoding="utf-8")
    arpa = folder / "lm.arpa"
    arpa.write_bytes(gzip.decompress((DATA / "flashlight" / "lm.arpa.gz").read_bytes()))
    return lexicon, arpa


def ours(lexicon: Path, lm: Path | None, beam_size: int) -> Decode:
    decoder = ctc_decoder(
        str(lexicon), TOKENS, None if lm is None else str(lm), beam_size=beam_size, beam_threshold=THRESHOLD
    )

    def decode(log_probs: np.ndarray) -> tuple[float, list[str]]:
        best = decoder(torch.from_numpy(log_probs)[None])[0][0]
        return best.score, best.words

    return decode


def flashlight(lexicon: Path, lm: Path | None, beam_size: int) -> Decode:
    library, names = optional("flashlight.lib.text.decoder"), optional("flashlight.lib.text.dictionary")
    numbers, words = names.Dictionary(TOKENS), names.load_words(str(lexicon))
    word_numbers = names.create_word_dict(words)
    model: Any = (
        library.ZeroLM() if lm is None else optional("flashlight.lib.text.decoder.kenlm").KenLM(str(lm), word_numbers)
    )
    silence = numbers.get_index("|")
    trie, start = library.Trie(len(TOKENS), silence), model.start(False)
    for word, spellings in words.items():
        number = word_numbers.get_index(word)
        for spelling in spellings:
            trie.insert([numbers.get_index(label) for label in spelling], number, model.score(start, number)[1])
    trie.smear(library.SmearingMode.MAX)
    options = library.LexiconDecoderOptions(
        beam_size=beam_size, beam_size_token=len(TOKENS), beam_threshold=THRESHOLD, lm_weight=2.0, word_score=0.0,
        unk_score=-math.inf, sil_score=0.0, log_add=False, criterion_type=library.CriterionType.CTC,
    )  # fmt: skip
    unknown = word_numbers.get_index("<unk>")
    blank = numbers.get_index("-")
    decoder = library.LexiconDecoder(options, trie, model, silence, blank, unknown, [], False)

    def decode(log_probs: np.ndarray) -> tuple[float, list[str]]:
        best = decoder.decode(log_probs.ctypes.data, *log_probs.shape)[0]
        return best.score, _said(best.words, word_numbers)

    return decode


def _said(found: Sequence[int], words: Any) -> list[str]:
    return [words.get_entry(word) for word in found if word >= 0]
