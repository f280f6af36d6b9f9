"""Dense to sparse without training: the feed-forwards of a trained model cut into experts, layer by layer.

Two streams of the calibration text run side by side, the dense model's and that of the model as it is by then, so that
each layer's down projection is fitted to bring the sparse stream back to the dense one. What is written is a model of a
family that transformers knows wherever its attention and a shared expert allow it (`target_of`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halve.checkpoint import Checkpoint, TensorWriter
from halve.compress.apply import carry_files, write_text
from halve.compress.calibrate import flat_batches
from halve.compress.experts import (
    RouterKind,
    Split,
    SplitFeedForward,
    expert_lengths,
    loudness,
    make_router,
    order_neurons,
    refit_down,
)
from halve.core.errors import CheckpointError, ConfigError, DataError
from halve.kernels.ops import Array, TokenBatch
from halve.kernels.reference import TorchOps
from halve.models.config import ModelConfig, read_config
from halve.models.decoder import DecoderLayer, WeightSource
from halve.models.names import (
    EMBEDDING,
    EXPERT_NAMES,
    FINAL_NORM,
    layer_groups,
    layer_norms,
    router_name,
    shared_gate_name,
)
from halve.models.rope import RopeTable

CALIBRATION_TOKENS = 32_768
# Families whose feed-forward is gated, without biases, and all that a layer has beside its attention.
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NATIVE = "HalveMoeForCausalLM"
MODEL_TYPES = {
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    NATIVE: "halve_moe",
}
_DROPPED = frozenset({"mlp_bias", "pretraining_tp", "model_type", "architectures", "attention_bias", "auto_map"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """How one layer was cut. router: how its rows were made; captured: share of experts' lengths that it finds on
    tokens held out; error: of the layer's output, relative; least, most: share of tokens of an expert.
    """

    layer: int
    router: RouterKind
    captured: float
    error: float
    least: float
    most: float


def split_of(config: ModelConfig, *, experts: int, active: int, shared: int) -> Split:
    """The cut that was asked for. Raises ConfigError naming the number, the rule and what would fit."""
    width = config.intermediate_size
    if not 2 <= experts <= width:
        raise ConfigError(f"--experts {experts}: must be from 2 to the {width} neurons of a feed-forward")
    if width % experts:
        fit = [e for e in range(2, min(width, 4 * experts) + 1) if width % e == 0]
        near = sorted(sorted(fit, key=lambda e: abs(e - experts))[:4])
        raise ConfigError(f"--experts {experts}: does not divide the {width} neurons of a feed-forward; {near} do")
    if not 0 <= shared < experts:
        raise ConfigError(f"--shared {shared}: must be from 0 to {experts - 1}, one fewer than the {experts} experts")
    if not 1 <= active <= experts - shared:
        rest = f"the {experts - shared} experts" + (" that are not shared" if shared else "")
        raise ConfigError(f"--active {active}: must be from 1 to {rest}")
    return Split(experts=experts, active=active, shared=shared, size=width // experts)


def sparsify_refusal(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Why a model can't be cut into experts, and the way out; or None."""
    if config.sparse:
        return f"{config.architecture}: is sparse already; give a dense model, or shrink this one by `halve optimize`"
    if config.architecture not in DENSE:
        return f"{config.architecture}: only {', '.join(DENSE)} can be cut into experts"
    if config.mlp_bias:
        return "the model's feed-forward has biases, which experts have not; take a model without"
    if checkpoint.config.get("quantization_config") is not None:
        return "the model is compressed; cut the original, then compress the result by `halve optimize`"
    return None


def target_of(config: ModelConfig, split: Split) -> str:
    """The family that computes the result: one of transformers' where it has this attention with these experts, else
    one of our own. Raises ConfigError for queries and keys that are normed beside a shared expert.
    """
    spec = config.layers[0]
    output_bias = config.attention_bias if config.output_bias is None else config.output_bias
    if spec.qk_norm is not None:
        if split.shared or spec.qk_norm != "head":
            raise ConfigError(
                f"{config.architecture}: norms queries and keys, which no family with a shared expert does; leave out "
                "--shared"
            )
        return "Qwen3MoeForCausalLM"
    if not config.attention_bias and not output_bias and not split.shared:
        return "MixtralForCausalLM"
    if not output_bias and split.shared:
        return "Qwen2MoeForCausalLM"
    if config.attention_bias and not output_bias:
        raise ConfigError(
            f"{config.architecture}: has biases of queries, keys and values alone, as only families with a shared "
            "expert have; add --shared 1"
        )
    return NATIVE


def split_layers(
    config: ModelConfig,
    source: WeightSource,
    documents: Sequence[Array],
    split: Split,
    *,
    window_tokens: int,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[SplitFeedForward, LayerFacts]]:
    """Cut every layer's feed-forward, from the first to the last; one layer of weights is in memory at a time.

    documents: int32 token ids each, of which CALIBRATION_TOKENS are used. Raises DataError when there are no tokens,
    CheckpointError naming the layer when the model itself makes NaN or infinity. progress: layers done, in all.
    """
    ops = TorchOps(device, widened=True)
    batches = calibration_batches(documents, window_tokens)
    with torch.inference_mode():
        table = ops.table(source.weight(EMBEDDING, (config.vocab_size, config.hidden_size)))
        dense = [ops.embed(table, batch.token_ids) for batch in batches]
        del table
        source.forget()
        sparse = list(dense)
        rope = RopeTable(config.head_dim)
        for index in range(config.num_layers):
            layer = DecoderLayer(config, index, ops, source, rope)
            dense = [layer.attend(x, batch) for x, batch in zip(dense, batches, strict=True)]
            sparse = [layer.attend(x, batch) for x, batch in zip(sparse, batches, strict=True)]
            made, facts = _split_layer(index, layer, dense, sparse, split)
            dense = [x + layer.feed_forward(x) for x in dense]
            sparse = [x + made(layer.normed(x)) for x in sparse]
            source.forget()
            yield made, facts
            if progress:
                progress(index + 1, config.num_layers)


def calibration_batches(documents: Sequence[Array], window_tokens: int) -> list[TokenBatch]:
    """The first CALIBRATION_TOKENS of the documents, and the rest of the batch that holds the last of them.

    Raises DataError when there are none.
    """
    found, left = [], CALIBRATION_TOKENS
    for windows in flat_batches(documents, window_tokens):
        if left > 0:
            found.append(TokenBatch.whole(windows))
            left -= found[-1].num_tokens
    if not found:
        raise DataError("the calibration text holds no tokens; give documents that are not empty")
    return found


def _split_layer(
    index: int, layer: DecoderLayer, dense: list[Tensor], sparse: list[Tensor], split: Split
) -> tuple[SplitFeedForward, LayerFacts]:
    gate, up = (matrix.dense() for _, matrix in layer.projections["gate_up"].linears)
    ((_, down_matrix),) = layer.projections["down"].linears
    down = down_matrix.dense()
    hidden = gate.shape[1]
    made = SplitFeedForward(split, gate, up, down, gate.new_zeros(split.routed, hidden), None)
    inputs = [layer.normed(x) for x in sparse]
    if not all(bool(torch.isfinite(x).all()) for x in inputs):
        raise CheckpointError(f"layer {index}: the model computes NaN or infinity on the calibration text")
    order, nearest = order_neurons(torch.cat([loudness(made.neurons(x), down) for x in inputs]), split)
    representatives = gate[nearest]
    made = replace(made, gate=gate[order], up=up[order], down=down[:, order])
    if split.shared:
        made.shared_gate = gate.new_zeros(1, hidden)
    lengths = [expert_lengths(made.neurons(x), made.down, split) for x in inputs]
    made.router, kind, captured = make_router(inputs, lengths, representatives, split.active)
    width = len(gate)
    moments, cross = gate.new_zeros(width, width), gate.new_zeros(width, hidden)
    squares, asked, count = 0.0, gate.new_zeros(width), 0
    for x, before, wanted in zip(inputs, sparse, dense, strict=True):
        shares = made.shares(x)
        kept = made.neurons(x) * shares
        target = wanted + layer.feed_forward(wanted) - before
        moments.addmm_(kept.t(), kept)
        cross.addmm_(kept.t(), target)
        squares += float(target.square().sum())
        asked += (shares > 0).sum(0)
        count += len(x)
    made.down = refit_down(moments, cross, made.down)
    # |Y - K D'|^2 = |Y|^2 - 2 <D', K'Y> + <D', K'K D'>
    left = squares + float(-2 * (cross * made.down.t()).sum() + ((moments @ made.down.t()) * made.down.t()).sum())
    load = asked[split.shared * split.size :: split.size] / count
    return made, LayerFacts(
        layer=index,
        router=kind,
        captured=captured,
        error=float(np.sqrt(max(left, 0.0) / max(squares, 1e-30))),
        least=float(load.min()),
        most=float(load.max()),
    )


def sparse_config(raw: Mapping[str, Any], config: ModelConfig, split: Split) -> dict[str, Any]:
    """config.json of the result."""
    name = target_of(config, split)
    made = {
        "architectures": [name],
        "model_type": MODEL_TYPES[name],
        **{key: value for key, value in raw.items() if key not in _DROPPED},
        "num_experts_per_tok": split.active,
        "sliding_window": None,
    }
    if name == "MixtralForCausalLM":
        return made | {"intermediate_size": split.size, "num_local_experts": split.routed}
    made |= {
        "moe_intermediate_size": split.size,
        "num_experts": split.routed,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }
    if split.shared:
        made["shared_expert_intermediate_size"] = split.shared * split.size
    made["qkv_bias" if name == "Qwen2MoeForCausalLM" else "attention_bias"] = config.attention_bias
    return made


def write_sparse(
    checkpoint: Checkpoint,
    config: ModelConfig,
    split: Split,
    layers: Iterator[SplitFeedForward],
    directory: Path,
    vectors: Mapping[str, Array] | None = None,
) -> ModelConfig:
    """Write the sparse model into `directory`, in the dense model's own number formats; returns its configuration.

    layers: one feed-forward a layer, taken as it is written. vectors: norm gains that changed, by name, float32.
    Raises OutputError when the disk is full.
    """
    raw = sparse_config(checkpoint.config, config, split)
    made = read_config(raw)
    reader, vectors = checkpoint.reader, vectors or {}
    dense_names = {
        f"{m.name}.weight": i
        for i in range(config.num_layers)
        for kind in ("gate_up", "down")
        for m in layer_groups(config, i)[kind].members
    }
    kept = [name for name in reader.names if name not in dense_names and "rotary_emb" not in name]
    specs = {name: (reader.info(name).dtype, reader.info(name).shape) for name in kept}
    like = {i: name for name, i in dense_names.items()}
    for i in range(config.num_layers):
        for name, shape in _layer_shapes(made, i).items():
            specs[name] = (reader.info(like[i]).dtype, shape)
    directory.mkdir(parents=True, exist_ok=True)
    with TensorWriter(directory, specs) as writer:
        for name in kept:
            stored = reader.read(name)
            writer.write(name, vectors[name].astype(stored.dtype) if name in vectors else stored)
        for i, layer in enumerate(layers):
            dtype = reader.read(like[i]).dtype
            for name, values in _layer_tensors(made, i, layer).items():
                writer.write(name, np.ascontiguousarray(values.cpu().numpy()).astype(dtype))
            reader.forget()
    write_text(directory / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    carry_files(checkpoint, directory)
    return made


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    experts, hidden = config.layers[layer].experts, config.hidden_size
    assert experts is not None
    found: dict[str, tuple[int, ...]] = {
        f"{m.name}.weight": m.shape
        for kind, group in layer_groups(config, layer).items()
        if kind not in ("qkv", "o")
        for m in group.members
    }
    found[router_name(config, layer)] = (experts.num_experts, hidden)
    if experts.shared_size:
        found[shared_gate_name(layer)] = (1, hidden)
    return found


def _layer_tensors(config: ModelConfig, layer: int, made: SplitFeedForward) -> dict[str, Tensor]:
    """Tensors of one layer by name: of experts, whose weights sum to one where ours are 1 each, and of shared ones,
    whose weight is at most one where ours is two.
    """
    split = made.split
    experts = config.layers[layer].experts
    assert experts is not None
    block = f"model.layers.{layer}.{experts.names}"
    gate, up, down = EXPERT_NAMES[experts.names]
    found = {router_name(config, layer): made.router}
    for e in range(split.routed):
        at = slice((split.shared + e) * split.size, (split.shared + e + 1) * split.size)
        parts = {gate: made.gate[at], up: made.up[at], down: made.down[:, at] * split.active}
        found |= {f"{block}.experts.{e}.{part}.weight": values for part, values in parts.items()}
    if made.shared_gate is not None:
        at = slice(0, split.shared * split.size)
        parts = {"gate_proj": made.gate[at], "up_proj": made.up[at], "down_proj": made.down[:, at] * 2}
        found |= {f"{block}.shared_expert.{part}.weight": values for part, values in parts.items()}
        found[shared_gate_name(layer)] = made.shared_gate
    return {name: values.detach() for name, values in found.items()}


def trained_gains(gains: Sequence[Tensor], final: Tensor) -> dict[str, Array]:
    """Gains of the norms before each feed-forward, and of the last norm, by their names in a checkpoint."""
    found = {layer_norms(i)[1]: gain.detach().cpu().numpy() for i, gain in enumerate(gains)}
    return found | {FINAL_NORM: final.detach().cpu().numpy()}
