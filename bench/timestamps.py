"""What timestamps cost: the masks of one step beside other filters, and whole decodes with and without."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.decode import SHAPES, make_pair
from bench.timing import Measurement, measurements, take_turns

__all__ = ["run"]

VOCAB, LM_VOCAB, END, BEGIN, COUNT = 51_866, 50_257, 50_257, 50_365, 1_501
BEAM, SUPPRESSED, PROMPT = 5, 90, 3


def run(device: str, quick: bool) -> Iterator[list[Measurement]]:
    """Masks are compared before anything is timed; decodes with and without timestamps run the same steps."""
    if device == "cpu":
        torch.set_num_threads(1)
    for utterances in (1,) if quick else (1, 8):
        yield masks(utterances, device, 2 if quick else 31)
    for name in ("tiny",) if quick else ("tiny", "whisper-small.en+gpt2"):
        yield decodes(name, 1, device, 1 if quick else 9)


def masks(utterances: int, device: str, repeats: int) -> list[Measurement]:
    """One step's masks for rows in the middle of their text, whose every token has to be looked at."""
    from shallowfusion import fused_step
    from shallowfusion.search.timestamps import TimestampRows, TimestampRules, allowed_words

    rows = utterances * BEAM
    generator = torch.Generator().manual_seed(0)
    logits, lm = (torch.randn((rows, size), generator=generator).mul(3).to(device) for size in (VOCAB, LM_VOCAB))
    suppressed = [*torch.randint(0, END, (SUPPRESSED,), generator=generator).tolist(), BEGIN - 1]
    bias = torch.zeros(VOCAB).index_fill(0, torch.tensor(suppressed), float("-inf")).to(device)
    rules = TimestampRules(BEGIN, COUNT, END)
    said = torch.tensor([BEGIN, *range(20)]).expand(rows, -1).to(device)
    state = TimestampRows.fresh(rows, device)
    for column in said.T:
        state = state.followed(rules, torch.arange(rows, device=device), column)
    history = torch.cat([torch.zeros((rows, PROMPT), dtype=torch.int64, device=device), said], dim=1)

    def ours() -> Tensor:
        return allowed_words(rules, state, logits, bias)

    def theirs(apply: object) -> Tensor:
        return apply(logits + bias, history)  # type: ignore[operator]

    others = {"transformers' processor": by_transformers(), "openai-whisper's filter": by_openai_whisper()}
    words = ours()
    mask = (words[:, :, None] >> torch.arange(32, device=device) & 1).view(rows, -1)[:, :VOCAB] == 1
    for apply in others.values():
        assert torch.equal(theirs(apply) > float("-inf"), mask & (bias == 0))
    weights, totals = torch.full((rows, 2), 0.5, device=device), torch.zeros(rows, device=device)
    numbers = {"beam_size": BEAM, "top_k": 2 * BEAM, "end_id": END, "token_bias": bias}
    providers = {
        "masks of timestamps": ours,
        **{name: lambda apply=apply: theirs(apply) for name, apply in others.items()},
        "fused step without mask": lambda: fused_step([logits, lm], weights, totals, **numbers),  # type: ignore[arg-type]
        "fused step with mask": lambda: fused_step([logits, lm], weights, totals, allowed=words, **numbers),  # type: ignore[arg-type]
    }
    seconds = take_turns(providers, repeats, 2, device)
    title = f"utterances={utterances} beams={BEAM} vocab={VOCAB}+{LM_VOCAB} threads={torch.get_num_threads()}"
    return measurements("timestamps", title, "float32", seconds, "fused step without mask")


def by_transformers() -> object:
    from transformers import GenerationConfig
    from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

    names = GenerationConfig(eos_token_id=END)
    names.no_timestamps_token_id, names.max_initial_timestamp_index = BEGIN - 1, 50
    processor = WhisperTimeStampLogitsProcessor(names, begin_index=PROMPT)
    return lambda logits, history: processor(history, logits)


def by_openai_whisper() -> object:
    from whisper.decoding import ApplyTimestampRules

    names = SimpleNamespace(no_timestamps=BEGIN - 1, timestamp_begin=BEGIN, eot=END)
    rules = ApplyTimestampRules(names, PROMPT, 50)

    def apply(logits: Tensor, history: Tensor) -> Tensor:
        rules.apply(logits, history)
        return logits

    return apply


def decodes(name: str, utterances: int, device: str, repeats: int) -> list[Measurement]:
    """Whole searches of encoder output; as many steps with timestamps as without."""
    shape, tokens = SHAPES[name], 16
    decoder = make_pair(shape, device).fused  # type: ignore[attr-defined]
    states = torch.randn((utterances, shape.frames, shape.width), device=device)
    options = {
        "beam_size": BEAM, "lm_weight": 0.24, "max_new_tokens": tokens, "min_new_tokens": tokens,
        "suppress_tokens": range(0, 900, 10),
    }  # fmt: skip
    timed = decoder.decode(states, without_timestamps=False, **options)
    assert all(result.best.spans is not None and len(result.best.token_ids) == tokens for result in timed)
    providers = {
        "with timestamps": lambda: decoder.decode(states, without_timestamps=False, **options),
        "without timestamps": lambda: decoder.decode(states, **options),
    }
    seconds = take_turns(providers, repeats, 1, device)
    threads = torch.get_num_threads()
    title = f"{name}, {utterances} utterances, beam {BEAM}, {tokens} tokens, threads={threads}"
    return measurements("timestamps", title, "float32", seconds, "without timestamps")
