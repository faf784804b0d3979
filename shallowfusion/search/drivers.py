"""Who drives a search: the host, step by step, or the device, followed by the host."""

from __future__ import annotations

import dataclasses
import logging

from shallowfusion.config import Driver
from shallowfusion.search.device_loop import DevicePrograms, device_search, refusal
from shallowfusion.search.loop import SearchOutcome, StageClock, search
from shallowfusion.search.sources import Sources

__all__ = ["driven_search", "warm_up"]

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 2


def driven_search(own: Sources, driver: Driver, clock: StageClock, programs: DevicePrograms) -> list[SearchOutcome]:
    """Run a search under the driver asked for; where the device cannot drive it, say why and let the host do it.

    Args:
        clock: its `driver` and `host_reason` say who did it.
        programs: of earlier device-driven searches.
    """
    if driver == "device":
        reason = _host_reason(own, programs)
        if reason is None:
            clock.driver = "device" if clock.host_reason is None else "host"
            return device_search(own.scorers, own.contexts, own.plan, clock, programs)
        clock.driver, clock.host_reason = "host", reason
        logger.warning("the host drives this search: %s", reason)
    return search(own.scorers, own.contexts, own.names, own.plan, clock, own.late)


def warm_up(own: Sources, driver: Driver, programs: DevicePrograms) -> None:
    """Do once what such a search does first: compile and capture its step, or take a step or two of it."""
    if driver == "device" and _host_reason(own, programs) is None:
        programs.warm_up(own.scorers, own.contexts, own.plan)
        return
    brief = dataclasses.replace(own.plan.settings, max_new_tokens=min(WARM_UP_TOKENS, own.plan.settings.max_new_tokens))
    plan = dataclasses.replace(own.plan, settings=brief)
    search(own.scorers, own.contexts, own.names, plan, StageClock(), own.late)


def _host_reason(own: Sources, programs: DevicePrograms) -> str | None:
    """Why the device cannot drive a search, as half a sentence."""
    reason = refusal(own.scorers, own.contexts, own.plan, own.late)
    return programs.refusal(own.scorers, own.contexts, own.plan) if reason is None else reason
