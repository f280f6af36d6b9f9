"""What a machine can do: its processors, their features and its memory."""

from halve.hardware.cuda import cuda_features, detect_cuda
from halve.hardware.detect import Device, detect_cpu, free_memory_bytes

__all__ = ["Device", "cuda_features", "detect_cpu", "detect_cuda", "free_memory_bytes"]
