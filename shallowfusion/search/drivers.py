"""Who drives a search: the host, step by step, or the device, followed by the host."""

from __future__ import annotations

import logging

from shallowfusion.config import DRIVERS, Driver, require
from shallowfusion.search.device_loop import DevicePrograms, device_search, refusal
from shallowfusion.search.loop import SearchOutcome, StageClock, search
from shallowfusion.search.sources import Sources

__all__ = ["driven_search"]

logger = logging.getLogger(__name__)


def driven_search(own: Sources, driver: Driver, clock: StageClock, programs: DevicePrograms) -> list[SearchOutcome]:
    """Run a search under the driver asked for; where the device cannot drive it, say why and let the host do it.

    Args:
        driver: "auto": the device where the models are on CUDA and it can; "device": wherever it can.
        programs: of earlier device-driven searches.
    """
    require(driver in DRIVERS, f"driver must be one of {', '.join(DRIVERS)}, got {driver!r}.")
    reason = _why_host(own, driver, programs)
    if reason is None:
        return device_search(own.scorers, own.contexts, own.plan, clock, programs)
    if driver == "device":
        logger.warning("the host drives this search: %s", reason)
    elif reason:
        logger.info("the host drives this search: %s", reason)
    return search(own.scorers, own.contexts, own.names, own.plan, clock, own.late)


def _why_host(own: Sources, driver: Driver, programs: DevicePrograms) -> str | None:
    """The reason; "" where the caller asked for it."""
    if driver == "host":
        return ""
    device = getattr(own.scorers[0], "device", None)
    if driver == "auto" and (device is None or device.type != "cuda"):
        return f"the models are on {device}"
    reason = refusal(own.scorers, own.contexts, own.plan, own.late)
    return programs.refusal(own.scorers, own.contexts, own.plan) if reason is None else reason
