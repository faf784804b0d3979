"""The `espnet` stop rule, end to end, against ESPnet's beam search over the same tiny model.

Keys of hypotheses at the limit differ (see `BeamStateProtocol`); they decide nothing in these utterances.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shallowfusion.decoder import FusionDecoder
from tests.tiny import ACOUSTIC_VOCAB, END, NO_TIMESTAMPS, START, random_encoder_output, tiny_decoder

espnet = pytest.importorskip("espnet.nets.beam_search")
interfaces = pytest.importorskip("espnet.nets.scorer_interface")


class Decoder(interfaces.ScorerInterface):
    """The tiny model as a scorer of ESPnet, without a cache."""

    def __init__(self, model: FusionDecoder) -> None:
        self.whisper = model.acoustic.scorer.model

    def score(self, y: torch.Tensor, state: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        tokens = torch.tensor([[START, NO_TIMESTAMPS, *y[1:].tolist()]])
        hidden = self.whisper.model.decoder(input_ids=tokens, encoder_hidden_states=x[None], use_cache=False)
        return torch.log_softmax(self.whisper.proj_out(hidden.last_hidden_state[0, -1]), dim=-1), None


class WordBonus(interfaces.ScorerInterface):
    """1 for every token but the end; ESPnet's own length bonus gives the end one as well."""

    def score(self, y: torch.Tensor, state: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        scores = torch.ones(ACOUSTIC_VOCAB)
        scores[END] = 0.0
        return scores, None


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("beam_size", "bonus"), [(1, 0.0), (3, 0.0), (5, 0.4)])
def test_hypotheses_and_totals_equal_espnet(beam_size: int, bonus: float, normalize: bool) -> None:
    model = tiny_decoder(1, lm=False)
    states = random_encoder_output(model.acoustic, 6, seed=4)
    ours = model.decode(
        states, beam_size=beam_size, n_best=beam_size, length_penalty=float(normalize), stop_rule="espnet",
        length_bonus=bonus, suppress_tokens=None, suppress_blank=False, max_new_tokens=states.shape[1],
    )  # fmt: skip
    scorers, weights = {"decoder": Decoder(model), "bonus": WordBonus()}, {"decoder": 1.0, "bonus": bonus}
    search = espnet.BeamSearch(scorers, weights, beam_size, ACOUSTIC_VOCAB, START, END, normalize_length=normalize)
    ended = 0
    for result, own in zip(ours, states, strict=True):
        with torch.inference_mode():
            found = [hypothesis.asdict() for hypothesis in search(own)]
        texts = [tuple(hypothesis["yseq"][1 : hypothesis["yseq"].index(END)]) for hypothesis in found]
        theirs = dict(zip(texts, (hypothesis["score"] for hypothesis in found), strict=True))
        assert len(result.n_best) == min(beam_size, len(found))
        for hypothesis in result.n_best:
            assert hypothesis.total == pytest.approx(theirs[hypothesis.token_ids], abs=1e-4)
        assert result.n_best[0].token_ids == texts[0]
        ended += result.n_best[0].ended
    assert ended >= 2
