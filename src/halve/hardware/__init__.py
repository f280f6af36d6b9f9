"""What a machine can do: its processors, their features and its memory."""

from halve.hardware.detect import Device, detect_cpu, free_memory_bytes

__all__ = ["Device", "detect_cpu", "free_memory_bytes"]
