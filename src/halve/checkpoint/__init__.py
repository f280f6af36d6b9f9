"""How tensors lie in a file: safetensors, compressed-tensors layouts, and the other files of a model directory."""

from halve.checkpoint.compressed_tensors import (
    VERSION,
    Layout,
    check_finite,
    quantization_config,
    read_weight,
    weight_specs,
    weight_tensors,
)
from halve.checkpoint.directory import Checkpoint, open_checkpoint
from halve.checkpoint.hub import resolve
from halve.checkpoint.safetensors import TensorInfo, TensorReader, TensorWriter

__all__ = [
    "VERSION",
    "Checkpoint",
    "Layout",
    "TensorInfo",
    "TensorReader",
    "TensorWriter",
    "check_finite",
    "open_checkpoint",
    "quantization_config",
    "read_weight",
    "resolve",
    "weight_specs",
    "weight_tensors",
]
