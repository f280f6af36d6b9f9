"""A checkpoint on disk to a decoder on a device: names checked first, then tensor by tensor."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from halve.checkpoint import Checkpoint
from halve.core.errors import CheckpointError
from halve.core.plan import Plan
from halve.formats import FORMATS, Format, Weight
from halve.kernels.ops import Array, Ops
from halve.models.config import ModelConfig, read_config
from halve.models.decoder import Decoder
from halve.models.names import LM_HEAD, modules, vectors

# Buffers that old conversions stored and that every reader recomputes.
RECOMPUTED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
PLAIN_FORMATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' word, ours
# Tensors of one matrix, by how the file stores it.
PARTS: Mapping[str, tuple[str, ...]] = {
    "plain": ("weight",),
    "int-quantized": ("weight", "weight_scale"),
    "float-quantized": ("weight", "weight_scale"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
}


class CheckpointSource:
    """`WeightSource` over the files as they are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def weight(self, module: str, shape: tuple[int, int]) -> Weight:
        """The stored matrix; CheckpointError when it is missing, of another shape, or holds NaN."""
        return self.checkpoint.read_weight(module, shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> Array:
        """The stored vector as float32; CheckpointError as above."""
        return self.checkpoint.read_vector(name, shape)

    def forget(self) -> None:
        """Give the mapped pages back to the system."""
        self.checkpoint.reader.forget()


def load_config(checkpoint: Checkpoint, plan: Plan | None = None) -> ModelConfig:
    """The model's configuration with the plan's cache formats; the checkpoint's tensors are checked by name.

    Raises PlanError for a plan that names layers which the model does not have.
    """
    config = read_config(checkpoint.config)
    check_names(checkpoint, config)
    return config.with_kv_format((plan or Plan()).kv_cache.formats(config.num_layers))


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Ops,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Every weight of the checkpoint on the device of `ops`."""
    return Decoder(config, ops, CheckpointSource(checkpoint), progress)


def stored_formats(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Format]:
    """The stored format of each module, from names and headers alone. CheckpointError for one that is no weight."""
    return {module.name: _stored_format(checkpoint, module.name) for module in modules(config)}


def _stored_format(checkpoint: Checkpoint, module: str) -> Format:
    compressed = checkpoint.layout.format_of(module)
    if compressed is not None:
        return compressed
    dtype = checkpoint.reader.info(f"{module}.weight").dtype
    if dtype not in PLAIN_FORMATS:
        raise CheckpointError(f"{module}.weight: stored as {dtype}; a plain weight is {' or '.join(PLAIN_FORMATS)}")
    return FORMATS[PLAIN_FORMATS[dtype]]


def check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse a checkpoint that misses tensors of this model or holds others, with CheckpointError naming them."""
    names = set(checkpoint.reader.names)
    expected = {name for name, _ in vectors(config)}
    for module in modules(config):
        stored = checkpoint.layout.stored(module.name)
        expected |= {f"{module.name}.{part}" for part in PARTS[stored.storage if stored else "plain"]}
    if missing := sorted(expected - names):
        packed = sorted(name for name in names - expected if name.endswith(".weight_packed"))
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors are missing: {_some(missing)}"
            + (f"; quantization_config of config.json does not name {_some(packed)}" if packed else "")
        )
    surplus = {name for name in names - expected if not any(fnmatchcase(name, p) for p in RECOMPUTED)}
    further = tuple(f"model.layers.{config.num_layers + i}." for i in range(config.surplus_layers))
    surplus = {name for name in surplus if not further or not name.startswith(further)}  # of predicting further tokens
    if config.tied and f"{LM_HEAD}.weight" in surplus:
        _check_tied_copy(checkpoint)
        surplus.remove(f"{LM_HEAD}.weight")
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path}: {len(surplus)} tensors are not part of a {config.architecture} with "
            f"{config.num_layers} layers: {_some(sorted(surplus))}; config.json and weights do not belong together"
        )


def _check_tied_copy(checkpoint: Checkpoint) -> None:
    """A tied model may store its table twice, but not two different ones."""
    table, head = checkpoint.reader.read("model.embed_tokens.weight"), checkpoint.reader.read("lm_head.weight")
    if table.dtype != head.dtype or table.shape != head.shape or table.tobytes() != head.tobytes():
        raise CheckpointError(
            f"{checkpoint.path}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
            "tie_word_embeddings; set it to false if the head is really separate"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
