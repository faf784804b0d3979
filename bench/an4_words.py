"""Real speech with an n-gram model of words: `python -m bench.an4_words --data ../shared/data`.

AN4 with the shipped AN4 model: a word trigram of the training transcripts (speakers of neither dev nor test) in the
CTC search, in the list that the attention decoder ranks, and in the joint search. Weights are chosen on dev; test is
decoded once with what was chosen. `bench.ctc_attention` has the same systems without a language model.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.recognition import save
from bench.rules import BATCH, Set, encoded
from shallowfusion import FusionDecoder, fusion
from shallowfusion.attention_rescoring import AttentionRescorer, RescoringOptions
from shallowfusion.ctc.settings import CtcOptions
from shallowfusion.demo.recordings import an4_recordings
from shallowfusion.demo.shipped import model_directory
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.ngrams import units
from shallowfusion.ngrams.arpa import write_arpa
from shallowfusion.ngrams.estimate import EstimateSettings, estimate

__all__ = ["main"]

CTC_BEAM, JOINT_BEAM = 50, 5
LM_WEIGHTS = (0.2, 0.5, 0.8)
WORD_BONUSES = (0.0, 1.0)
SHARES = (0.2, 0.5)
Run = Callable[[Set, tuple[float, ...]], list[str]]


def systems(words: Path) -> dict[str, tuple[Run, list[tuple[float, ...]], int]]:
    """Name -> how to decode with chosen numbers, the numbers to try, and the beam."""
    decoder = FusionDecoder.from_pretrained(model_directory("asr_an4"), device="cpu")
    fused = FusionDecoder.from_pretrained(model_directory("asr_an4"), words, device="cpu")
    rescorers: dict[tuple[float, float], AttentionRescorer] = {}

    def listed(own: Set, numbers: tuple[float, ...]) -> list[str]:
        share, lm_weight, word_bonus = numbers
        if (lm_weight, word_bonus) not in rescorers:
            search = CtcOptions(beam_size=CTC_BEAM, lm_weight=lm_weight, word_bonus=word_bonus)
            rescorers[lm_weight, word_bonus] = AttentionRescorer(decoder, search, words, threads=1)
        rescorer = rescorers[lm_weight, word_bonus]
        options = RescoringOptions(share, n_best=1, list_size=CTC_BEAM)
        if share == 1.0:
            return [result.text for result in rescorer._search(own.states, None, 1)]
        parts = [own.states[first : first + BATCH] for first in range(0, len(own.states), BATCH)]
        return [result.text for part in parts for result in rescorer.decode(part, None, options)]

    def joint(own: Set, numbers: tuple[float, ...]) -> list[str]:
        share, lm_weight = numbers
        found = []
        for first in range(0, len(own.states), BATCH):
            states, rule = own.states[first : first + BATCH], fusion.static(lm_weight)
            found += fused.decode(states, rule=rule, beam_size=JOINT_BEAM, ctc_weight=share)
        return [result.text for result in found]

    in_search = [(1.0, *rest) for rest in itertools.product(LM_WEIGHTS, WORD_BONUSES)]
    ranked = [(share, lm_weight, 1.0) for share, lm_weight in itertools.product(SHARES, (0.5,))]
    return {
        "CTC beam, words 3-gram": (listed, in_search, CTC_BEAM),
        "joint CTC-attention, words 3-gram": (joint, [(0.2, weight) for weight in (0.1, 0.3)], JOINT_BEAM),
        "attention rescoring of the CTC beam with words 3-gram": (listed, ranked, CTC_BEAM),
    }


def main(arguments: list[str] | None = None) -> int:
    """Choose, test and append to bench/results/recognition.csv."""
    parser = argparse.ArgumentParser(description="AN4 with an n-gram model of words.")
    parser.add_argument("--data", type=Path, required=True, help="directory with audio/manifest.jsonl")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "an4.arpa"
        texts = [text.lower() for _, text in an4_recordings(chosen.data, "train")]
        write_arpa(estimate(units.words().split(texts), EstimateSettings(order=3)).model, words)
        alone = FusionDecoder.from_pretrained(model_directory("asr_an4"), device="cpu")
        dev, test = (
            encoded(alone, [(path, text.lower()) for path, text in an4_recordings(chosen.data, part)])
            for part in ("dev", "test")
        )
        for name, (run, trials, beam_size) in systems(words).items():
            tried = [(sum(word_errors(dev.references, run(dev, own)).errors), own) for own in trials]
            print(name, tried, flush=True)
            numbers = min(tried)[1]
            shown = f"asr_an4; {name}; {', '.join(f'{number:g}' for number in numbers)}"
            save([_row(part, shown, beam_size, own, run(own, numbers)) for part, own in (("dev", dev), ("test", test))])
    return 0


def _row(part: str, model: str, beam_size: int, own: Set, texts: list[str]) -> dict[str, object]:
    found = word_errors(list(own.references), texts)
    low, high = found.interval()
    row: dict[str, object] = {
        "set": f"AN4 {part}", "model": model, "beam_size": beam_size, "utterances": len(texts),
        "words": sum(found.words), "errors": sum(found.errors), "wer": f"{found.rate:.4f}", "low": f"{low:.4f}",
        "high": f"{high:.4f}",
    }  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
