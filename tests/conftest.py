"""Settings of all tests: one thread, and Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)  # tiny tensors only wait for a second thread
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before any test module
