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

from bench import delayed_picture
from bench.timing import ROOT, Measurement, machine, measurements, take_turns
from shallowfusion import FusionDecoder, fusion
from shallowfusion.evaluation.word_errors import word_errors
from shallowfusion.fusion import Rule
from shallowfusion.scorers.causal_lm import CausalLMScorer
from shallowfusion.scorers.slots import SlotPlan, decoder_cache
from shallowfusion.search.bridging import LmBridge

__all__ = ["BurdenedLM", "main", "run"]

BATCH = 20
STAND_IN = {"add": (0.8, 0.3), "replace": (0.8, 0.3)}  # weight and proxy_weight in the CTC search
TIMED_CLIPS, TURNS = 3, 2
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
        bridge: how a model on other tokens is asked at every token.
    """

    family: str
    models: tuple[str, ...]
    rule: Rule
    beam_size: int
    bridge: LmBridge | None = None


def systems(beams: Sequence[int]) -> list[System]:
    found = [System("acoustic model alone", (), fusion.static(()), 5)]
    for beam in beams:
        found.append(System(AGAINST, ("own",), fusion.static(0.8), beam))
        if beam < 20:
            found.append(System("at every token, with 6-gram", ("own", "pieces"), fusion.static([0.5, 0.3]), beam))
        found.append(System("delayed", ("other",), fusion.delayed(0.8, interval=16), beam))
        for interval in (4, 8, 16):
            rule = fusion.delayed(0.8, interval=interval, proxy_weight=0.6)
            found.append(System("delayed, 6-gram stands in", ("other", "pieces"), rule, beam))
    found.append(System("at every token, by bytes", ("other",), fusion.static(0.8), 5, "bytes"))
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
        for name in counts:
            counts[name] += results[0].timing.counts.get(name, 0)
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


Key = tuple[tuple[str, ...], LmBridge | None]


def decoders(work: Path, burden: Any | None, wanted: Sequence[System]) -> dict[Key, FusionDecoder]:
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
    keys = {(own.models, own.bridge) for own in wanted}
    return {
        (names, bridge): FusionDecoder(acoustic, [models[name] for name in names], lm_bridge=bridge)
        for names, bridge in keys
    }


def rows_of(work: Path, clips: int, wanted: Sequence[System]) -> list[dict[str, object]]:
    from shallowfusion.demo.shipped import read_manifest

    chosen = read_manifest(work / "test")[:clips]
    light, heavy = decoders(work, None, wanted), decoders(work, gpt2_small(), wanted)
    states = torch.cat(
        [
            next(iter(light.values())).encode([c.path for c in chosen[i : i + BATCH]])
            for i in range(0, len(chosen), BATCH)
        ]
    )
    few = states[:TIMED_CLIPS]
    turns = take_turns(
        {str(i): lambda own=own: transcribed(heavy[own.models, own.bridge], few, own) for i, own in enumerate(wanted)},
        TURNS,
        0,
    )
    against = np.array(turns[str(next(i for i, own in enumerate(wanted) if own.family == AGAINST))])
    rows: list[dict[str, object]] = []
    for i, system in enumerate(wanted):
        start = time.perf_counter()
        texts, counts = transcribed(light[system.models, system.bridge], states, system)
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


def ctc_rows(work: Path, clips: int, only: Sequence[str] = ()) -> list[dict[str, object]]:
    """The CTC head: alone, with a word trigram in the search, with the byte-pair model late, or with both.

    Weights of the rows with a stand-in were chosen on the development clips.
    """
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
    for form in ("add", "replace"):
        stands_in = fusion.delayed(
            STAND_IN[form][0], interval=16, tail="free", proxy_weight=STAND_IN[form][1], proxy_form=form
        )  # type: ignore[arg-type]
        trials.append((f"CTC, word trigram stands in, {form}", trigram, stands_in, {"word_bonus": 1.0}))
    trials = [trial for trial in trials if not only or trial[0] in only]
    rows: list[dict[str, object]] = []
    for beam in (20, 100):
        for name, decoder, rule, names in trials:
            start, texts, counts = time.perf_counter(), [], {"llm_calls": 0, "llm_tokens": 0}
            for log_probs, frames in zip(scores, lengths, strict=True):
                results = decoder.decode(log_probs, frames, rule=rule, beam_size=beam, **names)
                texts += [result.text for result in results]
                for key in counts:
                    counts[key] += results[0].timing.counts.get(key, 0) if results[0].timing else 0
            seconds = (time.perf_counter() - start) / len(chosen)
            errors = word_errors([clip.text for clip in chosen], texts)
            rows.append({
                "system": name, "rule": str(rule or ""), "beam_size": beam, "utterances": len(chosen),
                "words": sum(errors.words), "errors": sum(errors.errors), "wer": f"{errors.rate:.4f}",
                "seconds_per_clip": f"{seconds:.4f}", **counts,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure, save and draw."""
    parser = argparse.ArgumentParser(description="Delayed fusion on the demo's clips.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="clips and models; what is missing is made")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--ctc-only", action="store_true", help="the CTC head alone")
    parser.add_argument("--no-ctc", action="store_true", help="the attention decoder alone")
    parser.add_argument("--beams", type=int, nargs="+", default=[5, 10, 20], help="of the attention decoder")
    parser.add_argument("--only", nargs="+", default=[], help="systems to measure (default: all)")
    chosen = parser.parse_args(arguments)
    wanted = [own for own in systems(chosen.beams) if not chosen.only or own.family in chosen.only]
    torch.set_num_threads(1)
    prepare(chosen.data, chosen.work)
    rows = [] if chosen.ctc_only else rows_of(chosen.work, chosen.clips, wanted)
    heard = ctc_rows(chosen.work, chosen.clips, chosen.only) if chosen.ctc_only or not chosen.no_ctc else []
    known, path = machine("cpu"), ROOT / "bench" / "results" / "delayed.csv"
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*known, *COLUMNS])
        if is_new:
            writer.writeheader()
        writer.writerows({**known, **row} for row in (*rows, *heard))
    return delayed_picture.main()


if __name__ == "__main__":
    sys.exit(main())
