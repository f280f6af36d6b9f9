"""Without a CUDA device Triton's interpreter stands in, which must be said before anything imports triton."""

import os

from halve.hardware import detect_cuda

if not detect_cuda()[0]:
    os.environ.setdefault("TRITON_INTERPRET", "1")
