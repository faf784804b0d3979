"""Which CTC search decodes: the C++ one, or the one in torch where the scores are."""

from __future__ import annotations

import logging

import torch

from shallowfusion.config import require
from shallowfusion.ctc.device_search import DeviceCtcSearch, device_obstacle
from shallowfusion.ctc.search import CtcSearch

__all__ = ["SearchChooser"]

logger = logging.getLogger(__name__)

LATE = 'a language model that is asked late needs the live prefixes; let the native search decode (backend="native").'
MOST_SEARCHES = 4  # device searches kept with their graphs


class SearchChooser:
    """Chooses the search for the scores at hand as `CtcOptions.backend` says, and logs why."""

    def __init__(self) -> None:
        self._searches: dict[tuple[int, torch.device], tuple[CtcSearch, DeviceCtcSearch]] = {}

    def choose(self, native: CtcSearch, log_probs: object, is_late: bool = False) -> CtcSearch | DeviceCtcSearch:
        """`native`, or a device search with its settings.

        Args:
            is_late: a language model is asked late, for which the device search has no place.

        Raises:
            InvalidArgumentError: backend="device" and settings that it cannot search.
        """
        device = log_probs.device if isinstance(log_probs, torch.Tensor) else torch.device("cpu")
        backend = native.options.backend
        if backend == "native" or (backend == "auto" and device.type == "cpu"):
            return native
        obstacle = LATE if is_late else device_obstacle(native.alphabet, native.options, native.language)
        require(not is_late or backend == "auto", f"the device search cannot do this: {obstacle}")
        if backend == "auto" and obstacle is not None:
            logger.info("the scores are copied from %s to the CPU, for the device search cannot do this: %s",
                        device, obstacle)  # fmt: skip
            return native
        kept = self._searches.get((id(native), device))
        if kept is None:
            if len(self._searches) >= MOST_SEARCHES:
                self._searches.clear()
            search = DeviceCtcSearch(native.alphabet, native.options, native.language, device, phrases=native.phrases)
            kept = self._searches[(id(native), device)] = (native, search)  # `native` is held: its id stays its own
        logger.debug("searching on %s, where the scores are", device)
        return kept[1]
