"""The public ARPA files, found beside the repository, and both tables."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from shallowfusion.ngrams.arpa import read_arpa
from shallowfusion.ngrams.model import NgramModel
from shallowfusion.ngrams.table import NgramTable
from shallowfusion.ngrams.table_reference import ReferenceNgramTable

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
ARPA_FILES = (
    "ctc/parlance/test.arpa",
    "ctc/pyctcdecode/bugs_bunny_kenlm.arpa",
    "ctc/torchaudio_toy/kenlm.arpa",
    "ctc/flashlight/lm.arpa.gz",
    "lm/an4/an4_full.bigram.arpa",
    "lm/an4/an4_full.trigram.arpa",
    "lm/an4/an4_spelling.trigram.arpa",
    "lm/an4/an4_words.trigram.arpa",
    "lm/weather_dialog.arpa.gz",
)


@cache
def shared_model(name: str) -> NgramModel:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip("the shared n-gram models are not here")
    return read_arpa(path)


@pytest.fixture(params=[NgramTable, ReferenceNgramTable], ids=["native", "reference"])
def table_class(request: pytest.FixtureRequest) -> type:
    return request.param
