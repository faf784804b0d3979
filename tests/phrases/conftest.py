from __future__ import annotations

import pytest

from shallowfusion.phrases.automaton import PhraseAutomaton
from shallowfusion.phrases.automaton_reference import ReferencePhraseAutomaton


@pytest.fixture(params=[PhraseAutomaton, ReferencePhraseAutomaton], ids=["native", "reference"])
def automaton_class(request: pytest.FixtureRequest) -> type:
    return request.param
