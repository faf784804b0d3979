"""The published Whisper + GPT-2 experiment for anyone with the weights: word error rate by the weight of the LM.

python -m bench.article --manifest manifest.jsonl --work DIRECTORY [--control-lm gpt2]    whisper-small.en, PubMed GPT-2
python -m bench.article --demo --work DIRECTORY                                           the models of the package

The article chose its weight on the test set. Here it is chosen on development documents, disjoint from the test
documents, and the test set is decoded with weight 0 and the chosen one; --test-curve decodes it with every weight too.
Every transcript is kept in the work directory, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.config import require
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.evaluation.manifest import Recording, check_disjoint
from shallowfusion.evaluation.normalisation import NORMALISERS, normaliser
from shallowfusion.evaluation.significance import sign_flip_test
from shallowfusion.evaluation.stored import HypothesisStore
from shallowfusion.evaluation.word_errors import WordErrors
from shallowfusion.training.session import EncodedSet, TunedSet

__all__ = ["Experiment", "Outcome", "main", "read_article_manifest", "run_experiment"]

ASR, LM = "openai/whisper-small.en", "cwestnedge/gpt2-small-pubmed"
LAMBDAS = tuple(round(0.03 * step, 2) for step in range(13))
INITIAL_STEPS = 2  # the article's warm-up
DEV_SHARE = 3  # every third document is for development


@dataclass(frozen=True)
class Experiment:
    """What is decoded.

    Args:
        lambdas: weights of the language model; 0 is the acoustic model alone, whether listed or not.
        beams: beam sizes; the article's own run is 1.
        test_curve: decode the test set with every weight too, as the article did.
    """

    lambdas: tuple[float, ...] = LAMBDAS
    beams: tuple[int, ...] = (1, 5)
    normaliser: str = "article"
    batch_size: int = 8
    test_curve: bool = False

    def __post_init__(self) -> None:
        require(
            any(self.lambdas) and min(self.lambdas) >= 0, f"lambdas must hold a weight above 0, got {self.lambdas}."
        )
        require(bool(self.beams) and min(self.beams) >= 1, f"beams must be at least 1, got {self.beams}.")


@dataclass(frozen=True)
class Outcome:
    """One beam size with one language model.

    Args:
        lm: its name; beam_size: of all decodings.
        dev: word errors of the development set by weight; `test`: of the test set, at least for 0 and `chosen`.
        chosen: the weight with the fewest development errors, the smallest among equals.
        p_better, p_value: permutation test of `chosen` against 0 on the test set, one- and two-sided.
        better, worse: test utterances with fewer and with more errors.
    """

    lm: str
    beam_size: int
    dev: Mapping[float, WordErrors]
    test: Mapping[float, WordErrors]
    chosen: float
    p_better: float
    p_value: float
    better: int
    worse: int


def read_article_manifest(path: Path) -> list[tuple[str, Recording]]:
    """Recordings with the document each is from.

    Lines are {"uuid", "file", "orig_id", "text"}, as the article's own, or {"id", "audio", "text"}, each recording then
    being a document of its own. Audio lies beside the manifest.

    Raises:
        InvalidArgumentError: no such file, or a line without audio or text, or an id twice.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as JSON lines ({error}).") from error
    found, known = [], set()
    for number, row in enumerate(rows, start=1):
        audio, text = row.get("file", row.get("audio")), str(row.get("text") or "").strip()
        require(bool(audio and text), f"{path}, line {number}: wanted file (or audio) and text, got {', '.join(row)}.")
        name = str(row.get("uuid", row.get("id", audio)))
        require(name not in known, f"{path}, line {number}: the id {name!r} was there before.")
        known.add(name)
        found.append((str(row.get("orig_id", name)), Recording(name, path.parent / str(audio), text)))
    require(bool(found), f"{path} holds no recordings.")
    return found


def split_documents(rows: Sequence[tuple[str, Recording]]) -> tuple[list[Recording], list[Recording]]:
    """Development and test recordings; every third document, in the order of checksums of their names, is for dev.

    Raises:
        InvalidArgumentError: too few documents for two parts.
    """
    documents = sorted({document for document, _ in rows}, key=lambda name: (zlib.crc32(name.encode()), name))
    held_out = set(documents[::DEV_SHARE])
    dev = [own for document, own in rows if document in held_out]
    test = [own for document, own in rows if document not in held_out]
    require(
        bool(dev and test),
        f"{len(rows)} recordings of too few documents cannot be parted into development and test set; give "
        "--dev-manifest.",
    )
    return dev, test


def run_experiment(
    decoders: Mapping[str, FusionDecoder],
    dev: Sequence[Recording],
    test: Sequence[Recording],
    work: Path,
    experiment: Experiment,
    progress: Callable[[Sequence[Any], str], Iterable[Any]] = lambda batches, _: batches,
) -> list[Outcome]:
    """Decode what the work directory lacks, and count.

    Args:
        decoders: by the name of their language model; the acoustic model is the same.
    """
    check_disjoint(dev, test)
    normalise = normaliser(experiment.normaliser)
    found = []
    with HypothesisStore(work / "hypotheses.jsonl") as store:
        for lm, decoder in decoders.items():
            encoded = EncodedSet(decoder, work / "encoded")
            encoded.make([*dev, *test], progress, experiment.batch_size)
            sets = [TunedSet(decoder, tuple(own), encoded, store, normalise, progress) for own in (dev, test)]
            found += [_outcome(lm, beam, sets[0], sets[1], experiment) for beam in experiment.beams]
    return found


def _outcome(lm: str, beam_size: int, dev: TunedSet, test: TunedSet, experiment: Experiment) -> Outcome:
    def errors(own: TunedSet, weight: float) -> WordErrors:
        rule = fusion.article(weight, INITIAL_STEPS) if weight else None
        options = DecodingOptions(beam_size=beam_size, rule=rule, batch_size=experiment.batch_size, end_threshold=None)
        return own.errors(own.decode(options, f"{lm}, beam {beam_size}, weight {weight:g}", fuses=weight > 0))

    weights = sorted({0.0, *experiment.lambdas})
    on_dev = {weight: errors(dev, weight) for weight in weights}
    chosen = min(weights, key=lambda weight: (sum(on_dev[weight].errors), weight))
    on_test = {weight: errors(test, weight) for weight in (weights if experiment.test_curve else {0.0, chosen})}
    pairs = zip(on_test[0.0].errors, on_test[chosen].errors, strict=True)
    differences = [new - old for old, new in pairs]
    return Outcome(
        lm, beam_size, on_dev, on_test, chosen, sign_flip_test(differences, "less"), sign_flip_test(differences),
        sum(own < 0 for own in differences), sum(own > 0 for own in differences),
    )  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Word error rates by weight, and the test of the chosen weight, as lines of text."""
    lines = []
    for own in outcomes:
        lines.append(f"{own.lm}, beam {own.beam_size}")
        lines.append("  lambda    " + " ".join(f"{weight:6.2f}" for weight in own.dev))
        lines.append("  dev WER % " + " ".join(f"{100 * errors.rate:6.2f}" for errors in own.dev.values()))
        shown = [f"{100 * own.test[weight].rate:6.2f}" if weight in own.test else "     -" for weight in own.dev]
        lines.append("  test WER %" + " ".join(["", *shown]))
        base, new = own.test[0.0], own.test[own.chosen]
        low, high = new.interval()
        lines.append(
            f"  chosen on dev: lambda {own.chosen:g}; test {100 * base.rate:.2f} -> {100 * new.rate:.2f} % "
            f"({100 * low:.2f} .. {100 * high:.2f}), p {own.p_better:.4f} one-sided, {own.p_value:.4f} two-sided, "
            f"{own.better} utterances better, {own.worse} worse"
        )
    return lines


def save(outcomes: Sequence[Outcome], path: Path) -> None:
    """Every decoding as a row of a CSV file, written anew."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["lm", "beam_size", "part", "lambda", "chosen", "utterances", "words", "errors", "wer"])
        for own in outcomes:
            for part, curve in (("dev", own.dev), ("test", own.test)):
                for weight, errors in curve.items():
                    counts = [len(errors.errors), sum(errors.words), sum(errors.errors), f"{errors.rate:.4f}"]
                    writer.writerow([own.lm, own.beam_size, part, weight, weight == own.chosen, *counts])


def main(arguments: list[str] | None = None) -> int:
    """Decode, print the table, and write it to article.csv in the work directory."""
    parser = argparse.ArgumentParser(description="Replay the Whisper + GPT-2 article.")
    parser.add_argument("--manifest", type=Path, help="the article's manifest.jsonl, or one of your own")
    parser.add_argument("--dev-manifest", type=Path, help="development recordings (default: a third of the documents)")
    parser.add_argument("--demo", action="store_true", help="the models and clips of the package instead")
    parser.add_argument("--asr", default=ASR, help=f"default: {ASR}")
    parser.add_argument("--lm", default=LM, help=f"default: {LM}")
    parser.add_argument("--control-lm", help="of no domain, for instance gpt2; the article's control")
    parser.add_argument("--lambdas", default=",".join(f"{weight:g}" for weight in LAMBDAS), metavar="W,W,...")
    parser.add_argument("--beams", default="1,5", metavar="N,N,...", help="default: 1,5")
    parser.add_argument("--normaliser", choices=NORMALISERS, default="article", help="default: article")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--test-curve", action="store_true", help="decode the test set with every weight too")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="the first N recordings of each part")
    parser.add_argument("--work", type=Path, required=True, help="gets encodings, transcripts and article.csv")
    chosen = parser.parse_args(arguments)
    try:
        outcomes = _run(chosen)
    except InvalidArgumentError as error:
        print(f"bench.article: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(outcomes)))
    save(outcomes, chosen.work / "article.csv")
    return 0


def _run(chosen: argparse.Namespace) -> list[Outcome]:
    from shallowfusion.cli.transcribe import progress

    experiment = Experiment(
        tuple(float(number) for number in chosen.lambdas.split(",")),
        tuple(int(number) for number in chosen.beams.split(",")),
        chosen.normaliser,
        chosen.batch_size,
        chosen.test_curve,
    )
    if chosen.demo:
        asr, lms, dev, test = _demo()
    else:
        require(chosen.manifest is not None, "give --manifest, or --demo.")
        asr, lms = chosen.asr, [chosen.lm, *([chosen.control_lm] if chosen.control_lm else [])]
        rows = read_article_manifest(chosen.manifest)
        dev, test = split_documents(rows) if chosen.dev_manifest is None else ([], [own for _, own in rows])
        if chosen.dev_manifest is not None:
            dev = [own for _, own in read_article_manifest(chosen.dev_manifest)]
    first = FusionDecoder.from_pretrained(asr, lms[0], device=chosen.device)
    decoders = {lms[0]: first}
    for name in lms[1:]:
        other = FusionDecoder.from_pretrained(asr, name, device=chosen.device)
        decoders[name] = FusionDecoder(first.acoustic, other.language_models)
    chosen.work.mkdir(parents=True, exist_ok=True)
    return run_experiment(decoders, dev[: chosen.limit], test[: chosen.limit], chosen.work, experiment, progress)


def _demo() -> tuple[str, list[str], list[Recording], list[Recording]]:
    """The demo models, their development clips, and their test clips."""
    from shallowfusion.demo.shipped import HERE, model_directory

    names = [str(model_directory(name)) for name in ("asr", "lm_medical", "lm_general")]
    parts = [[own for _, own in read_article_manifest(HERE / part / "manifest.jsonl")] for part in ("dev", "clips")]
    return names[0], names[1:], parts[0], parts[1]


if __name__ == "__main__":
    sys.exit(main())
