"""Kernels for NVIDIA devices in Triton. Importing this package loads neither torch nor triton; its modules do."""
