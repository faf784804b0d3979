"""Decoder files: options come back as they were, models are named from the file's place, nonsense is refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shallowfusion import DecodingOptions, FusionDecoder, fusion
from shallowfusion.cli.configuration import apply_configuration
from shallowfusion.cli.main import main
from shallowfusion.cli.transcribe import add_decoding_options, add_model_options, options_from
from shallowfusion.errors import InvalidArgumentError
from shallowfusion.scorers.fingerprints import tensor_fingerprint
from shallowfusion.training.decoder_file import DecoderFile, saved_options
from tests.shipped import decoder

OPTIONS = [
    DecodingOptions(),
    DecodingOptions(beam_size=7, length_bonus=0.25, end_threshold=None, suppress_tokens=[3, 4], suppress_blank=False),
    DecodingOptions(stop_rule="whisper", length_penalty=None, patience=2.0, early_stopping="never"),
    DecodingOptions(hotwords=["Fallot", "stent"], hotword_weight=3.0, no_repeat_ngram_size=4, initial_prompt="a b"),
    DecodingOptions(lm_prompt="a report of the heart", driver="device"),
    DecodingOptions(end_policy="asr_only", min_new_tokens=2, max_new_tokens=40, asr_temperature=1.5),
]


def file(options: DecodingOptions, rule: str = "static(0.4)") -> DecoderFile:
    return DecoderFile("some/model", ("gpt2",), rule, saved_options(options), ("a", "b"), None, {"errors": 3})


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_options_come_back_from_the_file_and_through_the_command_line(number, tmp_path: Path, monkeypatch) -> None:
    options = OPTIONS[number]
    file(options).save(tmp_path / "d.json")
    found = DecoderFile.load(tmp_path / "d.json")
    assert found == file(options)
    wanted = replace(options, rule=fusion.static(0.4), hotwords=options.weighted_hotwords() or None, hotword_weight=4.0)
    assert found.decoding_options() == wanted
    seen: list[DecodingOptions] = []

    def remember(arguments) -> int:
        apply_configuration(arguments)
        seen.append(options_from(arguments))
        assert (arguments.asr, arguments.lm) == ("some/model", ["gpt2"])
        return 0

    monkeypatch.setattr("shallowfusion.cli.transcribe.run", remember)
    assert main(["transcribe", "x.wav", "--config", str(tmp_path / "d.json")]) == 0
    assert seen == [wanted]
    assert main(["transcribe", "x.wav", "--config", str(tmp_path / "d.json"), "--beam-size", "3"]) == 0
    assert seen[1] == replace(wanted, beam_size=3)


def test_model_directories_are_named_from_the_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models" / "asr").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    own = replace(file(DecodingOptions()), asr="models/asr")
    own.save(tmp_path / "out" / "d.json")
    assert json.loads((tmp_path / "out" / "d.json").read_text())["asr"] == "../models/asr"
    monkeypatch.chdir(tmp_path / "out")
    found = DecoderFile.load(tmp_path / "out" / "d.json")
    assert Path(found.asr).samefile(tmp_path / "models" / "asr")
    assert found.lm == ("gpt2",)  # a hub id stays what it is


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "cake"}, "is no decoder file"),
        ({"version": 9}, "is no decoder file"),
        ({"rule": "magic(1)"}, "unknown rule"),
        ({"options": {"beams": 3}}, "unknown option beams"),
        ({"options": {"beam_size": 0}}, "beam_size must be"),
        ({"asr": 3}, "is no decoder file"),
        ({"calibration": {}}, "is no decoder file"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    file(DecodingOptions()).save(tmp_path / "d.json")
    record = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps(record | changes))
    with pytest.raises(InvalidArgumentError, match=words):
        DecoderFile.load(tmp_path / "d.json")


def test_an_option_the_command_line_lacks_is_named(tmp_path: Path) -> None:
    file(DecodingOptions(coverage="gnmt")).save(tmp_path / "d.json")
    arguments = argparse.Namespace(config=tmp_path / "d.json", keep_blank=False, hotword=None)
    with pytest.raises(InvalidArgumentError, match="sets coverage, which the command line has no option for"):
        apply_configuration(arguments)


def test_options_of_every_kind_come_out_of_the_file_as_they_went_in(tmp_path: Path) -> None:
    options = DecodingOptions(
        coverage="gnmt", coverage_weight=0.2, min_attention_centre=0.5, lm_temperature=(0.9, 1.1),
        suppress_tokens=[3, 4], hotwords={"stent": 3.0}, end_threshold=None, length_penalty=0.5, suppress_blank=False,
        early_stopping="never",
    )  # fmt: skip
    file(options).save(tmp_path / "d.json")
    parser = argparse.ArgumentParser()
    add_model_options(parser, is_required=False)
    add_decoding_options(parser)
    arguments = parser.parse_args(["--config", str(tmp_path / "d.json")])
    apply_configuration(arguments)
    assert replace(options_from(arguments), rule=None) == options


def test_the_trained_context_is_named_with_its_fingerprint_and_another_is_refused(tmp_path: Path) -> None:
    size = decoder().acoustic.scorer.model.config.d_model
    right, wrong = torch.ones((1, size)), torch.zeros((1, size))
    (tmp_path / "context.safetensors").write_bytes(b"")
    own = replace(
        file(DecodingOptions(), "internal_lm(0.8, 0.2, 'trained')"),
        fingerprints=decoder().fingerprints,
        internal_context=(str(tmp_path / "context.safetensors"), tensor_fingerprint(right)),
    )
    own.save(tmp_path / "d.json")
    assert json.loads((tmp_path / "d.json").read_text())["internal_context"]["file"] == "context.safetensors"
    found = DecoderFile.load(tmp_path / "d.json")
    arguments = argparse.Namespace(config=tmp_path / "d.json", keep_blank=False, hotword=None)
    apply_configuration(arguments)
    assert Path(arguments.internal_context).samefile(tmp_path / "context.safetensors")
    models = decoder().language_models
    found.check(FusionDecoder(decoder().acoustic, models, right))
    for context in (wrong, None):
        with pytest.raises(InvalidArgumentError, match="was made with the internal context"):
            found.check(FusionDecoder(decoder().acoustic, models, context))


def test_the_bridge_is_kept_and_checked(tmp_path: Path) -> None:
    own = replace(file(DecodingOptions()), fingerprints=decoder().fingerprints, lm_bridge="bytes")
    own.save(tmp_path / "d.json")
    found = DecoderFile.load(tmp_path / "d.json")
    assert found == own
    arguments = argparse.Namespace(config=tmp_path / "d.json", keep_blank=False, hotword=None)
    apply_configuration(arguments)
    assert arguments.lm_bridge == "bytes"
    acoustic, models = decoder().acoustic, decoder().language_models
    found.check(FusionDecoder(acoustic, models, lm_bridge="bytes"))
    with pytest.raises(InvalidArgumentError, match="made with lm_bridge='bytes', but the decoder has None"):
        found.check(FusionDecoder(acoustic, models))
    with pytest.raises(InvalidArgumentError, match='write "lm_bridge" into a file from before'):
        replace(own, lm_bridge=None).check(FusionDecoder(acoustic, models, lm_bridge="bytes"))


def test_files_from_before_the_bridge_was_kept_are_read(tmp_path: Path) -> None:
    file(DecodingOptions()).save(tmp_path / "d.json")
    record = json.loads((tmp_path / "d.json").read_text())
    del record["lm_bridge"]
    (tmp_path / "d.json").write_text(json.dumps(record))
    assert DecoderFile.load(tmp_path / "d.json").lm_bridge is None
    (tmp_path / "d.json").write_text(json.dumps(record | {"lm_bridge": "words"}))
    with pytest.raises(InvalidArgumentError, match="lm_bridge must be 'bytes' or None"):
        DecoderFile.load(tmp_path / "d.json")
