"""Who drives a search: the host, step by step, or the device, followed by the host."""

from __future__ import annotations

import logging

from shallowfusion.config import Driver
from shallowfusion.search.device_loop import DevicePrograms, device_search, refusal
from shallowfusion.search.loop import SearchOutcome, StageClock, search
from shallowfusion.search.sources import Sources

__all__ = ["driven_search"]

logger = logging.getLogger(__name__)


def driven_search(own: Sources, driver: Driver, clock: StageClock, programs: DevicePrograms) -> list[SearchOutcome]:
    """Run a search under the driver asked for; where the device cannot drive it, say why and let the host do it.

    Args:
        programs: of earlier device-driven searches.
    """
    if driver == "device":
        reason = refusal(own.scorers, own.contexts, own.plan, own.late)
        if reason is None:
            reason = programs.refusal(own.scorers, own.contexts, own.plan)
        if reason is None:
            return device_search(own.scorers, own.contexts, own.plan, clock, programs)
        logger.warning("the host drives this search: %s", reason)
    return search(own.scorers, own.contexts, own.names, own.plan, clock, own.late)
