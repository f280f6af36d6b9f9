"""What a machine can do: its processors, their features and its memory."""

from halve.hardware.cuda import cuda_features, detect_cuda
from halve.hardware.detect import Device, detect_cpu, free_memory_bytes
from halve.hardware.topology import Threads, Topology, default_threads, read_topology

__all__ = [
    "Device",
    "Threads",
    "Topology",
    "cuda_features",
    "default_threads",
    "detect_cpu",
    "detect_cuda",
    "free_memory_bytes",
    "read_topology",
]
