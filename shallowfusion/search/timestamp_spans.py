"""From tokens with timestamps to what lies between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from shallowfusion.search.timestamps import TimestampRules
from shallowfusion.values import Span

__all__ = ["spans_of"]


def spans_of(
    rules: TimestampRules, token_ids: Sequence[int], text_of: Callable[[Sequence[int]], str]
) -> tuple[Span, ...]:
    """The stretches of text between timestamps, in order; those without tokens are none.

    The timestamp before a stretch opens it, the one after it closes it; a last one may lack the second.

    Args:
        text_of: the text of tokens, with its leading space.
    """
    spans: list[Span] = []
    start, first = 0.0, 0
    for place, token in enumerate([*token_ids, rules.begin]):
        at_end = place == len(token_ids)
        if not (at_end or rules.is_timestamp(token)):
            continue
        if place > first:
            text = text_of(token_ids[first:place])
            end = None if at_end else rules.seconds(token)
            is_inside = any(span.text for span in spans)
            spans.append(Span(start, end, text if is_inside else text.lstrip(), first, place))
        start, first = rules.seconds(token), place + 1
    for place in reversed(range(len(spans))):
        spans[place] = dataclasses.replace(spans[place], text=spans[place].text.rstrip())
        if spans[place].text:
            break
    return tuple(spans)
