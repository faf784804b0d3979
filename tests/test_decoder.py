"""The public front on the shipped models: inputs of every kind, results of every shape, failures that stay alone."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import soundfile
import torch

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.errors import AudioError, InvalidArgumentError, ModelError, VocabularyError
from shallowfusion.features.log_mel import log_mel
from tests import tiny
from tests.shipped import ASR, MEDICAL, clip, decoder

FAST = {"beam_size": 2}


def test_paths_arrays_tensors_and_other_rates_give_the_same_text() -> None:
    samples, rate = soundfile.read(clip(2), dtype="float32")
    slow = {"array": np.repeat(samples, 2), "sampling_rate": 2 * rate}
    results = decoder().transcribe([clip(2), str(clip(2)), samples, torch.from_numpy(samples), slow], **FAST)
    texts = [result.text for result in results]
    assert texts[0]
    assert texts[1:4] == [texts[0]] * 3
    assert len(texts[4]) > 0.5 * len(texts[0])
    assert results[0].source == str(clip(2))
    assert results[2].source == "array 2"
    assert results[0].duration == pytest.approx(len(samples) / rate)


def test_one_recording_needs_no_list() -> None:
    assert len(decoder().transcribe(clip(2), **FAST)) == 1


def test_features_encoder_output_and_recordings_agree() -> None:
    model = decoder()
    samples = torch.from_numpy(soundfile.read(clip(2), dtype="float32")[0])
    features = log_mel([samples], model.acoustic.features)
    expected = model.transcribe([clip(2)], **FAST)[0].text
    assert model.decode(features, **FAST)[0].text == expected
    assert model.decode(model.acoustic.scorer.encode(features), **FAST)[0].text == expected


def test_the_acoustic_model_alone_equals_transformers_generate() -> None:
    model = decoder(with_lm=False)
    samples = [torch.from_numpy(soundfile.read(clip(i), dtype="float32")[0]) for i in (2, 5)]
    features = log_mel(samples, model.acoustic.features)
    for num_beams in (1, 4):
        theirs = model.acoustic.scorer.model.generate(features, num_beams=num_beams, max_new_tokens=300)
        texts = [model.acoustic.tokenizer.decode(row, skip_special_tokens=True).strip() for row in theirs]
        ours = model.decode(features, num_beams=num_beams, max_new_tokens=300)
        assert [result.text for result in ours] == texts


def test_results_hold_every_part_of_every_token() -> None:
    result = decoder().transcribe([clip(2)], beam_size=4, n_best=4, lm_weight=0.3, end_policy="lm")[0]
    assert len(result.n_best) == 4
    assert [h.score for h in result.n_best] == sorted((h.score for h in result.n_best), reverse=True)
    for hypothesis in result.n_best:
        assert set(hypothesis.parts) == {"asr", "lm"}
        wanted = hypothesis.parts["asr"] + 0.3 * hypothesis.parts["lm"]
        assert hypothesis.total == pytest.approx(wanted, abs=1e-3)
        assert "".join(token.text for token in hypothesis.tokens).strip() == hypothesis.text
        assert sum(t.parts["lm"] for t in hypothesis.tokens) == pytest.approx(hypothesis.parts["lm"], abs=1e-3)
    assert result.segments[0].text == result.text
    assert result.language == "en"
    assert result.timing is not None
    assert result.timing.rtfx > 0
    assert {"encoder", "asr", "lm", "fusion", "search"} <= set(result.timing.stages)


def test_parts_equal_the_models_own_log_probs() -> None:
    model = decoder()
    best = model.transcribe([clip(2)], beam_size=3, lm_weight=0.3)[0].best
    ids = torch.tensor([token.id for token in best.tokens])
    lm = model.language_models[0]
    context = torch.cat([torch.tensor([lm.vocabulary.end_id]), ids[:-1]])[None]
    with torch.inference_mode():
        log_probs = torch.log_softmax(lm.model(input_ids=context).logits[0], dim=-1)
    expected = log_probs[torch.arange(len(ids)), ids]
    expected[-1] = log_probs[-1].max()  # a neutral end costs what the favourite costs
    assert [token.parts["lm"] for token in best.tokens] == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_internal_lm_can_be_what_the_model_says_to_silence() -> None:
    model = decoder()
    rule = fusion.internal_lm(0.8, 0.2, "silence")
    best = model.transcribe([clip(2)], beam_size=3, rule=rule)[0].best
    wanted = best.parts["asr"] + 0.8 * best.parts["lm"] - 0.2 * best.parts["ilm"]
    assert best.total == pytest.approx(wanted, abs=1e-3)
    assert best.parts["ilm"] < 0


def test_results_take_the_shapes_of_other_libraries() -> None:
    result = decoder().transcribe([clip(2)], **FAST)[0]
    assert result.to_whisper()["text"] == result.text
    assert {"start", "end", "text", "tokens", "avg_logprob"} <= set(result.to_whisper()["segments"][0])
    segments, information = result.to_faster_whisper()
    assert segments[0].text == result.text
    assert information["language"] == "en"
    assert result.to_transformers()["chunks"][0]["timestamp"][0] == 0.0
    assert result.to_json()["n_best"][0]["text"] == result.text


def test_reranking_runs_no_model_and_can_undo_the_lm() -> None:
    result = decoder().transcribe([clip(2)], beam_size=4, n_best=4, lm_weight=0.3)[0]
    alone = result.rerank(fusion.static(0.0))
    asr = [h.parts["asr"] / len(h.tokens) for h in alone.n_best]
    assert asr == sorted(asr, reverse=True)


def test_a_failing_recording_leaves_the_others_alone(tmp_path, caplog) -> None:
    (tmp_path / "empty.wav").touch()
    long = np.zeros(31 * 16000, dtype=np.float32)
    with caplog.at_level(logging.ERROR):
        results = decoder().transcribe([clip(2), tmp_path / "empty.wav", long, clip(3)], **FAST)
    expected = decoder().transcribe([clip(2), clip(3)], **FAST)
    assert [results[0].text, results[3].text] == [result.text for result in expected]
    assert isinstance(results[1].error, AudioError)
    with pytest.raises(AudioError, match="is empty"):
        _ = results[1].text
    with pytest.raises(AudioError, match=r"lasts 31\.0 s.*up to 30 s.*long-form"):
        _ = results[2].text
    assert "empty.wav" in caplog.text


def test_batches_encoded_ahead_change_nothing_and_a_failing_recording_stays_alone(tmp_path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    items = [clip(2), clip(5), broken, clip(7), "missing.wav", clip(11), clip(3)]
    one, other = (
        decoder().transcribe(items, beam_size=2, batch_size=2, overlap_encoder=ahead) for ahead in (False, True)
    )
    assert [type(own.error) for own in one] == [type(own.error) for own in other]
    assert [own.source for own in other] == [str(item) for item in items]
    for own, wanted in zip(other, one, strict=True):
        if wanted.error is None:
            assert own.best.token_ids == wanted.best.token_ids
            assert own.best.total == wanted.best.total
            assert own.duration == wanted.duration
            assert own.timing.stages["encoder"] > 0
        else:
            assert isinstance(own.error, AudioError)


def test_silence_and_one_sample_are_transcribed_without_an_error() -> None:
    results = decoder().transcribe([np.zeros(16000, dtype=np.float32), np.zeros(1, dtype=np.float32)], **FAST)
    assert all(isinstance(result.text, str) for result in results)


def test_initial_prompt_is_read_and_not_returned() -> None:
    plain = decoder().transcribe([clip(2)], **FAST)[0]
    prompted = decoder().transcribe([clip(2)], initial_prompt="the patient", **FAST)[0]
    assert plain.best.parts["asr"] != prompted.best.parts["asr"]
    assert not prompted.text.startswith("the patient the patient")


def test_max_new_tokens_forces_an_end_and_says_so() -> None:
    result = decoder().transcribe([clip(2)], max_new_tokens=5, **FAST)[0]
    assert len(result.best.token_ids) == 5
    assert "forced_finish" in result.flags


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_text(dtype: str) -> None:
    half = FusionDecoder.from_pretrained(ASR, MEDICAL, device="cpu", dtype=dtype)
    texts = [result.text for result in half.transcribe([clip(2)], lm_weight=0.2)]
    expected = [result.text for result in decoder().transcribe([clip(2)], lm_weight=0.2)]
    assert abs(len(texts[0]) - len(expected[0])) <= 8


def test_bad_models_are_refused_with_a_reason(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    cases = {
        str(tmp_path / "nowhere"): "is not a directory",
        str(tmp_path): "holds no weights",
        MEDICAL: "is a 'gpt2' model, wanted a Whisper-type",
    }
    for name, words in cases.items():
        with pytest.raises(ModelError, match=words):
            FusionDecoder.from_pretrained(name)
    with pytest.raises(ModelError, match="is a Whisper model, wanted a causal"):
        FusionDecoder.from_pretrained(ASR, lm=ASR)
    with pytest.raises(ModelError, match="holds no config"):
        FusionDecoder.from_pretrained(str(clip(0).parent))


def test_bad_calls_are_refused_with_a_reason() -> None:
    model = decoder()
    cases = [
        ({"recordings": []}, "at least one recording"),
        ({"recordings": [clip(2)], "beams": 3}, "unknown option beams"),
        ({"recordings": [clip(2)], "lm_weight": -1.0}, "lm_weight must be"),
        ({"recordings": [clip(2)], "language": "de"}, "English-only"),
        ({"recordings": [clip(2)], "task": "translate"}, "English-only"),
        ({"recordings": [clip(2)], "suppress_tokens": [99999]}, "suppress_tokens must be ids"),
        ({"recordings": [clip(2)], "rule": fusion.static([0.1, 0.2])}, "weighs 2 language model"),
    ]
    for call, words in cases:
        with pytest.raises(InvalidArgumentError, match=words):
            model.transcribe(**call)
    with pytest.raises(InvalidArgumentError, match="either options or option names"):
        model.transcribe([clip(2)], DecodingOptions(), beam_size=2)
    with pytest.raises(InvalidArgumentError, match="inputs must be float log-mel features"):
        model.decode(torch.zeros(1, 80, 17))
    with pytest.raises(InvalidArgumentError, match="dtype must be"):
        FusionDecoder.from_pretrained(ASR, dtype="int7")
    with pytest.raises(InvalidArgumentError, match="device must be"):
        FusionDecoder.from_pretrained(ASR, device="abacus")


def test_a_language_model_with_other_tokens_is_refused_unless_it_is_delayed() -> None:
    model = FusionDecoder(decoder().acoustic, [tiny.tiny_lm()])
    for rule in (None, fusion.static(0.3), fusion.delayed(0.3, unit="tokens")):
        with pytest.raises(VocabularyError, match=r"no counterpart.*fusion\.delayed"):
            model.transcribe([clip(2)], rule=rule)
    with pytest.raises(VocabularyError, match="made without a tokenizer"):
        model.transcribe([clip(2)], rule=fusion.delayed(0.3))


def test_multilingual_models_get_language_and_task_tokens_and_detect_the_language() -> None:
    model = tiny.tiny_decoder(3, lm=False)
    tokens = model.acoustic.tokens
    object.__setattr__(tokens, "languages", {"en": 30, "de": 31, "fr": 32})
    object.__setattr__(tokens, "tasks", {"transcribe": 33, "translate": 34})
    assert model._planner._prefix("de", DecodingOptions(task="translate")) == [tiny.START, 31, 34, tiny.NO_TIMESTAMPS]
    states = tiny.random_encoder_output(model.acoustic, 5)
    found = model.decode(states, max_new_tokens=3)
    with torch.inference_mode():
        start = torch.full((5, 1), tiny.START)
        decoded = model.acoustic.scorer.model.model.decoder(input_ids=start, encoder_hidden_states=states)
        logits = model.acoustic.scorer.model.proj_out(decoded.last_hidden_state[:, -1])
    best = logits[:, [30, 31, 32]].argmax(dim=1).tolist()
    assert [result.language for result in found] == [["en", "de", "fr"][i] for i in best]
    with pytest.raises(InvalidArgumentError, match="language must be one of de, en, fr"):
        model.decode(states, language="xx")
