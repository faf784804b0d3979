"""Delayed fusion against fusion at every token and rescoring: word errors against time, on the demo's clips.

`python -m bench.delayed --data ../shared/data --work DIRECTORY [--clips 120]` trains what is missing in DIRECTORY (the
language model on byte pairs of `bench.delayed_lm`, a 6-gram of the acoustic pieces, a trigram of words), and writes
bench/results/delayed.csv and docs/delayed.svg. The demo's language models are small, so the acoustic decoder
takes the time; a second column runs a GPT-2-small-shaped model of random weights beside every pass of the language
model and throws its answers away, so that word errors are those of the trained model and times those of a big one.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.timing import ROOT, Measurement, machine, measurements, take_turns
from shallowfusion import FusionDecoder, fusion
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.fusion import Rule
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.slots import SlotPlan, decoder_cache

__all__ = ["BurdenedLM", "main", "run"]

BATCH = 20
TIMED_CLIPS = 10
AGAINST = "at every token"  # at the smallest beam
COLUMNS = (
    "system", "rule", "beam_size", "utterances", "words", "errors", "wer", "seconds_per_clip", "llm_calls",
    "llm_tokens", "seconds_per_clip_gpt2_small", "times_faster_gpt2_small",
)  # fmt: skip


class BurdenedLM(CausalLMScorer):
    """A language model whose every pass and every row of logits also costs what GPT-2 small's would."""

    def __init__(self, inner: CausalLMScorer, burden: Any) -> None:
        super().__init__(inner.model, inner.vocabulary, inner.tokenizer)
        self.burden = burden

    def _hidden(self, cache: Any, token_ids: Tensor, positions: Tensor, plan: SlotPlan) -> Tensor:
        if not hasattr(cache, "burden"):
            cache.burden = decoder_cache(self.burden.config.num_hidden_layers, False)
        for layer in cache.burden.layers:
            layer.plan = plan
        self.burden.base_model(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=plan.mask_for(self.burden),
            past_key_values=cache.burden,
            use_cache=True,
        )
        return super()._hidden(cache, token_ids, positions, plan)

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        self.burden.get_output_embeddings()(hidden.new_zeros((len(hidden), self.burden.config.n_embd)))
        return super().head(hidden)


@dataclass(frozen=True)
class System:
    """One way to decode.

    Args:
        family: one line of the picture.
        models: which language models of the bench: "own" (acoustic tokens), "other" (byte pairs), "pieces" (6-gram).
    """

    family: str
    models: tuple[str, ...]
    rule: Rule
    beam_size: int


def systems() -> list[System]:
    found = [System("acoustic model alone", (), fusion.static(()), 5)]
    for beam in (5, 10):
        found.append(System("at every token", ("own",), fusion.static(0.8), beam))
        found.append(System("at every token, with 6-gram", ("own", "pieces"), fusion.static([0.5, 0.3]), beam))
        found += [System("delayed", ("other",), fusion.delayed(0.8, interval=i), beam) for i in (4, 16)]
        for interval in (2, 4, 8, 16, 32):
            rule = fusion.delayed(0.8, interval=interval, proxy_weight=0.6)
            found.append(System("delayed, 6-gram stands in", ("other", "pieces"), rule, beam))
    found.append(System("6-gram of pieces", ("pieces",), fusion.static(0.6), 5))
    found.append(System("rescoring of the 20 best", ("other",), fusion.delayed(0.6, "interval", None), 20))
    return found


def gpt2_small(layers: int = 12, width: int = 768, vocabulary: int = 50_257) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=layers, n_embd=width, n_head=max(1, width // 64), vocab_size=vocabulary)
    ).eval()


def transcribed(decoder: FusionDecoder, states: Tensor, system: System) -> tuple[list[str], dict[str, int]]:
    """Texts and counts."""
    texts: list[str] = []
    counts: dict[str, int] = {"llm_calls": 0, "llm_tokens": 0}
    for start in range(0, len(states), BATCH):
        results = decoder.decode(states[start : start + BATCH], rule=system.rule, beam_size=system.beam_size)
        texts += [result.text for result in results]
        assert results[0].timing is not None
        for name, count in results[0].timing.counts.items():
            counts[name] += count
    return texts, counts


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """The shipped clips with the shipped medical model on the acoustic tokens, alone and as big as GPT-2 small."""
    from tests.shipped import ASR, CLIPS, MEDICAL

    decoder = FusionDecoder.from_pretrained(ASR, MEDICAL, device=device, dtype="float32")
    burden = gpt2_small(2, 64, 1000) if quick else gpt2_small().to(device)
    states = decoder.encode(CLIPS[: 4 if quick else 20])
    rules = {
        "at every token": fusion.static(0.8),
        "delayed, every 4 tokens": fusion.delayed(0.8, interval=4),
        "delayed, every 16 tokens": fusion.delayed(0.8, interval=16),
        "rescoring": fusion.delayed(0.8, interval=None),
    }
    heavy = FusionDecoder(decoder.acoustic, [BurdenedLM(decoder.language_models[0], burden)])  # type: ignore[arg-type]
    for shape, own in (("demo models", decoder), ("demo models, lm as big as gpt2", heavy)):
        providers = {
            name: lambda own=own, rule=rule: own.decode(states, rule=rule, beam_size=5) for name, rule in rules.items()
        }
        seconds = take_turns(providers, 1 if quick else 3, 0 if quick else 1, device)
        yield measurements("delayed", f"{shape}, {len(states)} clips, beam 5", "float32", seconds, "at every token")


def prepare(data: Path, work: Path) -> None:
    """Clips, the language model on byte pairs and the 6-gram, where they are missing."""
    from bench import delayed_lm
    from shallowfusion.cli.main import main as command
    from shallowfusion.demo.corpus import MEDICAL_SOURCES, read_sentences
    from shallowfusion.demo.shipped import model_directory
    from shallowfusion.demo.train import write_evaluation_clips

    write_evaluation_clips(data, work)
    if not (work / "lm_bpe" / "model.safetensors").exists():
        delayed_lm.main(["--data", str(data), "--out", str(work / "lm_bpe")])
    if not (work / "pieces6.arpa").exists():
        texts = [sentence.text for sentence in read_sentences(data, MEDICAL_SOURCES, speakable=False)]
        (work / "medical.txt").write_text("\n".join(texts), encoding="utf-8")
        units = ["--units", "tokens", str(model_directory("asr"))]
        command(["build-ngram", str(work / "medical.txt"), "--out", str(work / "pieces6.arpa"), "--order", "6", *units])
        command(["build-ngram", str(work / "medical.txt"), "--out", str(work / "words3.arpa")])


def decoders(work: Path, burden: Any | None) -> dict[tuple[str, ...], FusionDecoder]:
    """One decoder per set of models; with a burden the neural language models cost as much as GPT-2 small."""
    from shallowfusion.demo.shipped import model_directory
    from shallowfusion.scorers.loading import load_language_model, load_whisper

    where = (torch.device("cpu"), torch.float32)
    acoustic = load_whisper(str(model_directory("asr")), *where)
    names = {"own": model_directory("lm_medical"), "other": work / "lm_bpe", "pieces": work / "pieces6.arpa"}
    models: dict[str, Any] = {
        key: load_language_model(str(path), acoustic.scorer.vocabulary, *where) for key, path in names.items()
    }
    if burden is not None:
        models |= {key: BurdenedLM(models[key], burden) for key in ("own", "other")}
    return {keys: FusionDecoder(acoustic, [models[key] for key in keys]) for keys in {own.models for own in systems()}}


def rows_of(work: Path, clips: int) -> list[dict[str, object]]:
    from shallowfusion.demo.shipped import read_manifest

    chosen = read_manifest(work / "test")[:clips]
    light, heavy = decoders(work, None), decoders(work, gpt2_small())
    states = torch.cat(
        [light[()].encode([c.path for c in chosen[i : i + BATCH]]) for i in range(0, len(chosen), BATCH)]
    )
    few = states[:TIMED_CLIPS]
    turns = take_turns(
        {str(i): lambda own=own: transcribed(heavy[own.models], few, own) for i, own in enumerate(systems())}, 3, 0
    )
    against = np.array(turns[str(next(i for i, own in enumerate(systems()) if own.family == AGAINST))])
    rows: list[dict[str, object]] = []
    for i, system in enumerate(systems()):
        start = time.perf_counter()
        texts, counts = transcribed(light[system.models], states, system)
        seconds = (time.perf_counter() - start) / len(states)
        errors = word_errors([clip.text for clip in chosen], texts)
        own = np.array(turns[str(i)])
        rows.append({
            "system": system.family, "rule": str(system.rule), "beam_size": system.beam_size,
            "utterances": len(chosen), "words": sum(errors.words), "errors": sum(errors.errors),
            "wer": f"{errors.rate:.4f}", "seconds_per_clip": f"{seconds:.4f}", **counts,
            "seconds_per_clip_gpt2_small": f"{np.median(own) / len(few):.3f}",
            "times_faster_gpt2_small": f"{np.median(against / own):.2f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def ctc_rows(work: Path, clips: int) -> list[dict[str, object]]:
    """The CTC head: alone, with a word trigram in the search, with the byte-pair model late, or with both."""
    from shallowfusion.ctc.decoder import CTCDecoder
    from shallowfusion.demo.shipped import model_directory, read_manifest
    from shallowfusion.scorers.loading import load_causal_lm, load_whisper

    where = (torch.device("cpu"), torch.float32)
    acoustic = FusionDecoder(load_whisper(str(model_directory("asr")), *where))
    head, llm = acoustic.acoustic.ctc_head, load_causal_lm(str(work / "lm_bpe"), *where)
    assert head is not None
    chosen = read_manifest(work / "test")[:clips]
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    scores = [head.log_probs(acoustic.encode([clip.path for clip in batch])) for batch in batches]
    lengths = [[head.num_frames(clip.seconds, scores[0].shape[1]) for clip in batch] for batch in batches]
    own = (head.labels, head.blank, " ")
    plain = CTCDecoder(*own, threads=1, llm=llm)
    trigram = CTCDecoder(*own, lm=work / "words3.arpa", threads=1, llm=llm)
    trials: list[tuple[str, CTCDecoder, Rule | None, dict[str, float]]] = [
        ("CTC alone", plain, None, {}),
        ("CTC, word trigram", trigram, None, {"lm_weight": 0.5, "word_bonus": 1.0}),
    ]
    for tail in ("mean", "free"):
        for interval in (4, 16, 64, None):
            trials.append(("CTC, delayed", plain, fusion.delayed(0.6, interval=interval, tail=tail), {}))  # type: ignore[arg-type]
    both = fusion.delayed(0.5, interval=16, tail="free")
    trials.append(("CTC, word trigram, delayed", trigram, both, {"lm_weight": 0.3, "word_bonus": 1.0}))
    rows: list[dict[str, object]] = []
    for beam in (20, 100):
        for name, decoder, rule, names in trials:
            start, texts, counts = time.perf_counter(), [], {"llm_calls": 0, "llm_tokens": 0}
            for log_probs, frames in zip(scores, lengths, strict=True):
                results = decoder.decode(log_probs, frames, rule=rule, beam_size=beam, **names)
                texts += [result.text for result in results]
                for key, count in (results[0].timing.counts if results[0].timing else {}).items():
                    counts[key] += count
            seconds = (time.perf_counter() - start) / len(chosen)
            errors = word_errors([clip.text for clip in chosen], texts)
            rows.append({
                "system": name, "rule": str(rule or ""), "beam_size": beam, "utterances": len(chosen),
                "words": sum(errors.words), "errors": sum(errors.errors), "wer": f"{errors.rate:.4f}",
                "seconds_per_clip": f"{seconds:.4f}", **counts,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def picture(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Word error rate against seconds with an LM as big as GPT-2 small; one line per family and beam."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    lines: dict[tuple[object, object], list[dict[str, object]]] = {}
    for row in rows:
        lines.setdefault((row["system"], row["beam_size"]), []).append(row)
    for (family, beam), own in lines.items():
        own = sorted(own, key=lambda row: float(str(row["seconds_per_clip_gpt2_small"])))
        x = [float(str(row["seconds_per_clip_gpt2_small"])) for row in own]
        y = [100 * float(str(row["wer"])) for row in own]
        axes.plot(x, y, marker="o", label=f"{family}, beam {beam}")
    axes.set(xscale="log", xlabel="seconds per clip, LM as big as GPT-2 small, one CPU thread", ylabel="WER, %")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, save and draw."""
    parser = argparse.ArgumentParser(description="Delayed fusion on the demo's clips.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="clips and models; what is missing is made")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--ctc-only", action="store_true", help="the CTC head alone; nothing is drawn")
    parser.add_argument("--no-ctc", action="store_true", help="the attention decoder alone")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepare(chosen.data, chosen.work)
    rows = [] if chosen.ctc_only else rows_of(chosen.work, chosen.clips)
    heard = ctc_rows(chosen.work, chosen.clips) if chosen.ctc_only or not chosen.no_ctc else []
    known, path = machine("cpu"), ROOT / "bench" / "results" / "delayed.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *COLUMNS])
        if is_new:
            writer.writeheader()
        writer.writerows({**known, **row} for row in (*rows, *heard))
    if rows:
        picture(rows, ROOT / "docs" / "delayed.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
