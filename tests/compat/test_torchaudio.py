"""torchaudio's interface against flashlight-text, the decoder behind it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shallowfusion.compat.torchaudio import CTCHypothesis, ctc_decoder
from shallowfusion.errors import InvalidArgumentError, ModelError, VocabularyError
from tests.ctc.conftest import LIBRI_TEXT, libri, shared_file

TOKENS = ["-", "|", "f", "o", "b", "a", "r"]


def flashlight(
    lexicon: Path | None, tokens: list[str], lm: Path | None, emissions: torch.Tensor, **options: Any
) -> list[CTCHypothesis]:
    """The same decoder on flashlight-text."""
    decoder_package = pytest.importorskip("flashlight.lib.text.decoder")
    dictionary_package = pytest.importorskip("flashlight.lib.text.dictionary")
    beam_size_token = options.pop("beam_size_token", None) or len(tokens)
    names = {
        "beam_size": 50, "beam_threshold": 50, "lm_weight": 2.0, "sil_score": 0.0, "log_add": False, **options
    }  # fmt: skip
    names |= {"beam_size_token": beam_size_token, "criterion_type": decoder_package.CriterionType.CTC}
    numbers = dictionary_package.Dictionary(tokens)
    words = dictionary_package.load_words(str(lexicon)) if lexicon else {t: [[t]] for t in [*tokens, "<unk>"]}
    word_numbers = dictionary_package.create_word_dict(words)
    if lexicon is None:  # create_word_dict numbers them in no order, where labels must keep theirs
        word_numbers = dictionary_package.Dictionary([*tokens, "<unk>"])
    model = decoder_package.ZeroLM()
    if lm is not None:
        model = pytest.importorskip("flashlight.lib.text.decoder.kenlm").KenLM(str(lm), word_numbers)
    blank, silence = numbers.get_index("-"), numbers.get_index("|")
    if lexicon is None:
        settings = decoder_package.LexiconFreeDecoderOptions(**names)
        decoder = decoder_package.LexiconFreeDecoder(settings, model, silence, blank, [])
    else:
        trie = decoder_package.Trie(len(tokens), silence)
        start = model.start(False)
        for word, spellings in words.items():
            number = word_numbers.get_index(word)
            for spelling in spellings:
                trie.insert([numbers.get_index(t) for t in spelling], number, model.score(start, number)[1])
        trie.smear(decoder_package.SmearingMode.MAX)
        names = {"word_score": 0.0, "unk_score": -math.inf, **names}
        settings = decoder_package.LexiconDecoderOptions(**names)
        unknown = word_numbers.get_index("<unk>")
        decoder = decoder_package.LexiconDecoder(settings, trie, model, silence, blank, unknown, [], False)
    emissions = emissions.contiguous()
    found = decoder.decode(emissions.data_ptr(), *emissions.shape)
    return [_hypothesis(result, word_numbers, blank) for result in found]


def _hypothesis(result: Any, words: Any, blank: int) -> CTCHypothesis:
    labels = list(result.tokens)
    starts = [i for i, label in enumerate(labels) if label != blank and (i == 0 or label != labels[i - 1])]
    said = [words.get_entry(word) for word in result.words if word >= 0]
    return CTCHypothesis(torch.tensor([labels[i] for i in starts]), said, result.score, torch.tensor(starts))


def assert_same(ours: list[CTCHypothesis], theirs: list[CTCHypothesis], same_times: bool = True) -> None:
    """Equal scores in order; equal contents wherever a score is alone."""
    assert len(ours) == len(theirs)
    scores = [other.score for other in theirs]
    np.testing.assert_allclose([one.score for one in ours], scores, atol=2e-4, rtol=1e-6)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if sum(abs(score - scores[i]) < 1e-3 for score in scores) == 1:
            assert one.words == other.words
            assert one.tokens.tolist() == other.tokens.tolist()
            assert not same_times or one.timesteps.tolist() == other.timesteps.tolist()


def emissions_of(frames: int, labels: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn((frames, labels), generator=generator) * sharpness, dim=1)


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Path]:
    """A lexicon with a prefix of another word, two spellings, a homophone and a word of one label; a language model."""
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("foo f o o |\nbar b a r |\nfoobar f o o b a r |\nfoo f o |\nfew f o o |\na a\n")
    lm = tmp_path / "words.arpa"
    lm.write_text(
        "\\data\\\nngram 1=8\nngram 2=4\n\n\\1-grams:\n-1.5\t<unk>\n-99\t<s>\t-0.4\n-1.1\t</s>\n-0.7\tfoo\t-0.3\n"
        "-0.9\tbar\t-0.2\n-1.3\tfoobar\t-0.1\n-1.7\tfew\t-0.2\n-2.0\ta\t-0.5\n\n\\2-grams:\n-0.2\t<s> foo\n"
        "-0.3\tfoo bar\n-0.6\tbar </s>\n-0.4\tbar a\n\n\\end\\\n"
    )
    return lexicon, lm


OPTIONS: list[dict[str, Any]] = [
    {},
    {"log_add": True},
    {"beam_size": 4, "beam_threshold": 6.0},
    {"beam_size_token": 3, "word_score": 1.5, "sil_score": -0.7},
    {"unk_score": -2.0, "lm_weight": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_lm", [False, True])
def test_words_of_a_lexicon_score_as_in_flashlight(toy, options, seed, with_lm) -> None:
    lexicon, lm = toy
    if not with_lm:  # nothing tells words of one spelling apart, and flashlight breaks ties by addresses
        lexicon.write_text(lexicon.read_text().replace("few f o o |", "few f o b |"))
    emissions = emissions_of(14, len(TOKENS), seed)
    decoder = ctc_decoder(str(lexicon), TOKENS, str(lm) if with_lm else None, nbest=1000, **options)
    assert_same(decoder(emissions[None])[0], flashlight(lexicon, TOKENS, lm if with_lm else None, emissions, **options))


@pytest.mark.parametrize("options", [*OPTIONS[:3], {"sil_score": 0.5, "beam_size_token": 4}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_labels_alone_score_as_in_flashlight(tmp_path, options, seed) -> None:
    lm = tmp_path / "labels.arpa"
    unigrams = "".join(f"-{0.5 + i / 10}\t{token}\t-0.2\n" for i, token in enumerate(TOKENS[1:]))
    lm.write_text(
        f"\\data\\\nngram 1={len(TOKENS) + 2}\nngram 2=2\n\n\\1-grams:\n-2\t<unk>\n-99\t<s>\t-0.3\n-1\t</s>\n{unigrams}"
        "\n\\2-grams:\n-0.1\to o\n-0.3\t<s> b\n\n\\end\\\n"
    )
    emissions = emissions_of(10, len(TOKENS), seed)
    for model in (None, lm):
        decoder = ctc_decoder(None, TOKENS, None if model is None else str(model), nbest=1000, **options)
        ours = decoder(emissions[None])[0]
        assert all(hypothesis.words == [] for hypothesis in ours)
        theirs = flashlight(None, TOKENS, model, emissions, **options)
        assert_same(ours, [other._replace(words=[]) for other in theirs])


def test_torchaudios_toy_is_read_as_flashlight_reads_it() -> None:
    lexicon, lm = (shared_file(f"torchaudio_toy/{name}") for name in ("lexicon.txt", "kenlm.arpa"))
    labels = {label for line in lexicon.read_text().splitlines() for label in line.split()[1:]}
    tokens = ["-", "|", *sorted(labels - {"-", "|"})]
    for seed in range(3):
        emissions = emissions_of(20, len(tokens), seed)
        decoder = ctc_decoder(str(lexicon), tokens, str(lm), nbest=20)
        assert_same(decoder(emissions[None])[0], flashlight(lexicon, tokens, lm, emissions)[:20])


def test_a_spoken_sentence_is_decoded_as_by_flashlight(tmp_path) -> None:
    tokens = ["|", *"abcdefghijklmnopqrstuvwxyz'", "-"]
    lexicon = tmp_path / "lexicon.txt"
    more = ["ill", "mine", "deer", "wheel", "goods", "had", "days", "member"]
    lexicon.write_text("".join(f"{word} {' '.join(word)} |\n" for word in sorted({*LIBRI_TEXT.split(), *more})))
    emissions = torch.from_numpy(np.ascontiguousarray(libri())).float()
    decoder = ctc_decoder(str(lexicon), tokens, nbest=3)
    ours = decoder(emissions[None])[0]
    assert " ".join(ours[0].words) == LIBRI_TEXT
    assert decoder.idxs_to_tokens(ours[0].tokens)[:3] == ["|", "i", "|"]
    # alignments of one text tie here, so times may differ
    assert_same(ours[:1], flashlight(lexicon, tokens, None, emissions)[:1], same_times=False)
    free = flashlight(None, tokens, None, emissions)[:1]
    assert_same(ctc_decoder(None, tokens)(emissions[None])[0], free, same_times=False)


def test_pieces_and_batches_give_what_one_call_gives(toy) -> None:
    lexicon, lm = toy
    decoder = ctc_decoder(str(lexicon), TOKENS, str(lm), nbest=5)
    batch = torch.stack([emissions_of(12, len(TOKENS), seed) for seed in range(3)])
    lengths = torch.tensor([12, 7, 0])
    together = decoder(batch, lengths)
    for emissions, count, wanted in zip(batch, lengths.tolist(), together, strict=True):
        decoder.decode_begin()
        for start, stop in itertools.pairwise([0, min(1, count), min(5, count), count]):
            decoder.decode_step(emissions[start:stop])
        decoder.decode_end()
        found = decoder.get_final_hypothesis()
        assert [h.score for h in found] == [h.score for h in wanted]
        assert [h.words for h in found] == [h.words for h in wanted]


def test_nan_loses_its_utterance_alone(toy, caplog) -> None:
    decoder = ctc_decoder(str(toy[0]), TOKENS, nbest=2)
    batch = torch.stack([emissions_of(12, len(TOKENS), seed) for seed in range(3)])
    wanted = decoder(batch)
    batch[1, 5, 0] = math.nan
    found = decoder(batch)
    assert found[1] == []
    assert "utterance 1 was not decoded" in caplog.text
    for place in (0, 2):
        assert [h.score for h in found[place]] == [h.score for h in wanted[place]]
    assert len(decoder(batch, torch.tensor([12, 5, 12]))[1]) == 2  # NaN behind the end is not looked at


def test_token_files_and_dictionaries(toy, tmp_path) -> None:
    lexicon, lm = toy
    tokens, words = tmp_path / "tokens.txt", tmp_path / "words.txt"
    tokens.write_text("- <blank>\n|\nf\no\nb\na\nr\n")
    words.write_text("foo\nbar\nfoobar\nfew\na\n")
    emissions = emissions_of(9, len(TOKENS), 1)[None]
    by_file = ctc_decoder(lexicon, tokens, lm, lm_dict=words, blank_token="<blank>")(emissions)
    assert by_file[0][0].score == ctc_decoder(lexicon, TOKENS, lm)(emissions)[0][0].score
    words.write_text("foo\n")
    with pytest.raises(VocabularyError, match="lacks 4 words"):
        ctc_decoder(lexicon, tokens, lm, lm_dict=words)


def test_bad_arguments_are_refused(toy, tmp_path) -> None:
    lexicon, _ = toy
    decoder = ctc_decoder(lexicon, TOKENS)
    (tmp_path / "bad.txt").write_text("fox f o x |\n")
    nan = torch.full((1, 3, len(TOKENS)), math.nan)
    for error, wrong in (
        (VocabularyError, lambda: ctc_decoder(tmp_path / "bad.txt", TOKENS)),
        (VocabularyError, lambda: ctc_decoder(lexicon, TOKENS, blank_token="<b>")),
        (ModelError, lambda: ctc_decoder(tmp_path / "none.txt", TOKENS)),
        (ModelError, lambda: ctc_decoder(lexicon, TOKENS, "model.bin")),
        (InvalidArgumentError, lambda: ctc_decoder(lexicon, TOKENS, beam_size=0)),
        (InvalidArgumentError, lambda: ctc_decoder(lexicon, TOKENS, nbest=0)),
        (InvalidArgumentError, lambda: decoder(torch.zeros(3, 4))),
        (InvalidArgumentError, lambda: decoder(torch.zeros(1, 3, 4))),
        (InvalidArgumentError, lambda: decoder(torch.zeros(1, 3, len(TOKENS)), torch.tensor([4]))),
        (InvalidArgumentError, lambda: decoder.decode_step(nan[0])),
    ):
        with pytest.raises(error):
            wrong()
