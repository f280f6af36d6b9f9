"""What a model computes, as data: sizes, and one `LayerSpec` a layer. `config.py` reads them from config.json."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from halve.kernels.ops import kv_token_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions. Sources: arXiv:2104.09864; linear: arXiv:2306.15595; llama3: arXiv:2407.21783; yarn:
    arXiv:2309.00071.

    attention_factor: cos and sin are multiplied by it. interleaved: pairs are neighbours, (2i, 2i + 1), instead of
    half a head apart; heads are then reordered so that pairs lie half a head apart, queries and keys alike.
    """

    theta: float
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A sparse feed-forward: each token runs through `top_k` of `num_experts`, gated units of `intermediate_size`.

    A token's scores are the softmax or, each for itself, the sigmoid of its logits; router_bias: logits have a bias.
    The largest top_k of them are chosen, `correction` (a stored vector) added for the choice alone. With num_groups
    above 1 experts lie in groups of equal size, and only those of the best top_groups can be chosen: a group counts as
    its largest score or as the sum of its two largest. Weights are the scores of the chosen, divided by their sum where
    `renormalize` says so, times `scale`; they multiply what experts give or what they are given (`weigh`).

    bias: of the experts' matrices. clamp: (alpha, limit) of gates that are not silu(gate) * up but
    min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (clip(up, -limit, limit) + 1).
    shared_size: inner width of an expert that every token runs through, 0 for none; with shared_gate its output is
    multiplied by the sigmoid of a logit of its own. names, router_name, shared_name: how the checkpoint calls the
    parts, `names.EXPERT_NAMES`. stacked: other engines keep all experts of a layer in one tensor.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    shared_size: int = 0
    names: Literal["mlp", "block_sparse_moe", "feed_forward"] = "mlp"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["largest", "two"] = "largest"
    scale: float = 1.0
    weigh: Literal["output", "input"] = "output"
    bias: bool = False
    clamp: tuple[float, float] | None = None
    shared_gate: bool = True
    router_name: Literal["gate", "router"] = "gate"
    shared_name: Literal["shared_expert", "shared_experts"] = "shared_expert"
    stacked: bool = False

    @property
    def fused(self) -> bool:
        """Whether it runs as a part of one fused program: see `compiled.py`."""
        return self.scores == "softmax" and self.num_groups == 1 and not self.correction and self.weigh == "output"

    @property
    def removable(self) -> bool:
        """Whether single experts can be left out or merged: no groups, biases or corrections go with them."""
        return self.num_groups == 1 and not (self.bias or self.router_bias or self.correction)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Attention whose queries, keys and values come from narrow latents. Source: arXiv:2405.04434, 2.1.

    A head's queries and keys are `plain_dim` values without positions, then `rope_dim` with them, where keys share one
    vector among heads; values have `value_dim`. query_rank: width of the queries' latent, None where they come from x
    itself; kv_rank: of keys and values.
    """

    query_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """What one layer computes; a family differs from another in these values, not in code.

    window: sliding-window attention over that many tokens, None for full. chunk: attention within chunks of that many
    positions. rope None: no positions in this layer. sinks: one more softmax logit a head. experts None: a dense
    feed-forward. qk_norm: an RMS norm of queries and of keys before positions, of each head or of all heads of a token
    together; "after": of each head, after positions and without a gain; None for none. query_scale: queries are
    multiplied by it. temperature: (floor, scale), queries at position p are multiplied by
    1 + scale * ln(1 + floor((p + 1) / floor)). Source: arXiv:2501.19399.
    """

    window: int | None = None
    chunk: int | None = None
    rope: Rope | None = None
    sinks: bool = False
    experts: Experts | None = None
    qk_norm: Literal["head", "row", "after"] | None = None
    query_scale: float = 1.0
    temperature: tuple[float, float] | None = None
    kv_format: str = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder: sizes, and one LayerSpec a layer.

    attention_bias: of queries, keys and values; output_bias: of what attention gives, None for the same.
    intermediate_size: of dense feed-forwards; dense_name: how the checkpoint calls these. latent: attention from
    latents, head_dim then is of queries and keys, and values are widened to it with zeros. surplus_layers: so many more
    that the checkpoint may hold and that decoding does not need.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int  # tokens; the most positions the model was made for
    rms_norm_eps: float
    tied: bool  # the embedding table is also the lm_head
    attention_bias: bool
    mlp_bias: bool
    layers: tuple[LayerSpec, ...]
    output_bias: bool | None = None
    latent: Latent | None = None
    dense_name: Literal["mlp", "feed_forward"] = "mlp"
    surplus_layers: int = 0
    version: int = 1

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    @property
    def sparse(self) -> bool:
        """Whether any layer sends its tokens to experts."""
        return any(layer.experts is not None for layer in self.layers)

    @property
    def plain(self) -> bool:
        """Whether every layer is of the kind that runs as one CUDA graph (`captured.py`)."""
        return self.fused and all(
            layer.experts is None
            and layer.qk_norm is None
            and layer.chunk is None
            and (layer.rope is None or layer.rope.attention_factor == 1)
            for layer in self.layers
        )

    @property
    def fused(self) -> bool:
        """Whether every layer is of the kind that runs as one program on the CPU (`compiled.py`)."""
        return self.latent is None and all(
            layer.qk_norm != "after"
            and layer.temperature is None
            and layer.query_scale == 1
            and (layer.rope is None or not layer.rope.interleaved)
            and (layer.experts is None or layer.experts.fused)
            for layer in self.layers
        )

    @property
    def timed(self) -> bool:
        """Whether the search can time its steps: they run as one program, and layers differ in no shape."""
        return self.fused and len({layer.experts for layer in self.layers}) == 1

    @property
    def rotary_dim(self) -> int:
        """Values of a head that positions rotate."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers, with their scales."""
        return sum(2 * self.num_kv_heads * kv_token_bytes(layer.kv_format, self.head_dim) for layer in self.layers)

    def with_kv_format(self, kv_format: str | Sequence[str]) -> "ModelConfig":
        """The same model with every layer's cache in `kv_format`, or each in its own."""
        formats = [kv_format] * len(self.layers) if isinstance(kv_format, str) else kv_format
        layers = zip(self.layers, formats, strict=True)
        return replace(self, layers=tuple(replace(layer, kv_format=one) for layer, one in layers))
