"""Models as they are judged: the original, and a smaller one as it lies on disk."""

from halve.api.bundle import read_plan
from halve.api.model import make_ops, torch_ops
from halve.checkpoint import Checkpoint
from halve.core.plan import ActivationFormat
from halve.evaluate.scorer import DecoderScorer
from halve.kernels.ops import Ops
from halve.models import CheckpointSource, Decoder, ModelConfig, load_config, load_decoder
from halve.models.decoder import Projection
from halve.models.names import head_group, num_parameters

KEEP_BYTES = 1 << 30  # of the original's final states, kept while candidates are judged on the same text
WIDEN_BYTES = 1 << 30  # a model no larger than this in float32 is scored from float32 weights


def original_scorer(checkpoint: Checkpoint, config: ModelConfig, device: str) -> DecoderScorer:
    """The original model in float32 arithmetic by the reference kernels.

    Its head is kept in float32 whatever the size of the model: it runs for few rows at a time.
    """
    decoder = load_decoder(checkpoint, config, _reference_ops(config, device))
    if not _widened(config):
        decoder.head = Projection(head_group(config), torch_ops(device, widened=True), CheckpointSource(checkpoint))
    return DecoderScorer(decoder, keep_bytes=KEEP_BYTES)


def reload(checkpoint: Checkpoint, device: str, activations: ActivationFormat | None = None) -> Decoder:
    """A compressed model as it lies on disk, by the reference kernels and as its plan says but for `activations`."""
    plan = read_plan(checkpoint)
    config = load_config(checkpoint, plan)
    return load_decoder(checkpoint, config, _reference_ops(config, device, activations or plan.activations.format))


def as_judged(made: Checkpoint, device: str, *, large: bool) -> Decoder:
    """A candidate by the reference kernels; a large one by those that will serve it, which are several times as fast.

    The certificate is measured by the latter in any case, and says how far they are from the reference.
    """
    if not large or device != "cpu":
        return reload(made, device)
    plan = read_plan(made)
    return load_decoder(made, load_config(made, plan), make_ops("cpu", plan.activations.format))


def _reference_ops(config: ModelConfig, device: str, activations: str = "fp32") -> Ops:
    return torch_ops(device, activations, widened=_widened(config))


def _widened(config: ModelConfig) -> bool:
    """Whether weights are kept in float32 while a model is scored."""
    return 4 * num_parameters(config) <= WIDEN_BYTES
