"""One decoder, dense or sparse: a model family is a configuration, and its names are declared once."""

from halve.models.config import LayerSpec, ModelConfig, read_config
from halve.models.decoder import Decoder, WeightSource
from halve.models.load import CheckpointSource, load_config, load_decoder, stored_formats
from halve.models.offload import OffloadSource
from halve.models.ready import ReadySource

__all__ = [
    "CheckpointSource",
    "Decoder",
    "LayerSpec",
    "ModelConfig",
    "OffloadSource",
    "ReadySource",
    "WeightSource",
    "load_config",
    "load_decoder",
    "read_config",
    "stored_formats",
]
