"""Settings of all tests: one thread, Triton's interpreter where there is no CUDA device, the same random examples.

`pytest --hypothesis-profile explore` draws new examples, and ten times as many: a way to look for failures, which a
check that must mean the same on two days is not.
"""

from __future__ import annotations

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors only wait for a second thread
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any test module

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None)
settings.load_profile("fixed")
