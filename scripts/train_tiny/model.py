"""A small Llama or Mixtral whose state dict is the Hugging Face checkpoint: same names, same rotary convention.

Shapes: B sequences, T tokens, H hidden size, D head size, N rows of a flat batch, E experts, K chosen ones.
Mixture of experts as in arXiv:2401.04088, load balance as in arXiv:2101.03961 (eq. 4), z-loss as in arXiv:2202.08906
(eq. 5).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halve.core.errors import CheckpointError, ConfigError
from train_tiny.text import BOS, EOS, PAD


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of one model; num_experts == 0 means a dense feed-forward."""

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 512  # tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    num_experts: int = 0
    top_k: int = 2
    aux_coef: float = 0.01  # weight of the load balance loss

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "context")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: must be 1 or more")
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden size {self.hidden_size} and {self.num_heads} heads: the head size must be whole and even, "
                f"so the hidden size must be a multiple of {2 * self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            allowed = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(f"{self.num_kv_heads} KV heads do not divide {self.num_heads} heads; allowed: {allowed}")
        if self.num_experts < 0 or (self.num_experts and not 1 <= self.top_k <= self.num_experts):
            raise ConfigError(f"top-k {self.top_k} of {self.num_experts} experts: must be 1 to the number of experts")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    def to_hf(self) -> dict[str, Any]:
        """The model's config.json."""
        out: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM" if self.num_experts else "LlamaForCausalLM"],
            "model_type": "mixtral" if self.num_experts else "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "torch_dtype": "bfloat16",
        }
        if self.num_experts:
            out |= {
                "num_local_experts": self.num_experts,
                "num_experts_per_tok": self.top_k,
                "router_aux_loss_coef": self.aux_coef,
                "output_router_logits": False,
                "sliding_window": None,
            }
        return out

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json. Raises CheckpointError when it is not one of a model that this program wrote."""
        if raw.get("model_type") not in ("llama", "mixtral") or not raw.get("tie_word_embeddings"):
            raise CheckpointError(
                f"model_type {raw.get('model_type')!r}, tie_word_embeddings {raw.get('tie_word_embeddings')!r}: "
                "train_tiny reads llama and mixtral with tied embeddings"
            )
        try:
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=raw["num_attention_heads"],
                num_kv_heads=raw["num_key_value_heads"],
                context=raw["max_position_embeddings"],
                rope_theta=raw.get("rope_theta") or raw.get("rope_parameters", {}).get("rope_theta", 10000.0),
                norm_eps=raw["rms_norm_eps"],
                num_experts=raw.get("num_local_experts", 0),
                top_k=raw.get("num_experts_per_tok", 2),
                aux_coef=raw.get("router_aux_loss_coef", 0.01),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json has no {error}; train_tiny needs every size of the model") from error


class RMSNorm(nn.Module):
    """Root mean square norm in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H], any float type; returns the same."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Half-split rotary embedding, as in the Hugging Face checkpoints; cos and sin hold D / 2 columns."""
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD), dim=-1)


class Attention(nn.Module):
    """Causal attention with grouped KV heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, H]; cos, sin: [T, D / 2]."""
        B, T, _ = x.shape
        q, k, v = (
            projection(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.config.num_heads // self.config.num_kv_heads
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return out


class DenseMlp(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, H]; a dense layer has no losses of a router."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)), None


class Expert(nn.Module):
    """One feed-forward under Mixtral's names: w1 gate, w3 up, w2 down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x_NH: Tensor) -> Tensor:
        """x: the rows that chose this expert."""
        out: Tensor = self.w2(functional.silu(self.w1(x_NH)) * self.w3(x_NH))
        return out


class SparseMlp(nn.Module):
    """top_k of num_experts per token, weights renormalised over the chosen ones."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_experts))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of rows per expert changes at each call
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, H]. Returns the output and [Switch balance loss, 1.0 when the load is even; router z-loss]."""
        shape, E, K = x.shape, self.config.num_experts, self.config.top_k
        x = x.reshape(-1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.gate.weight.float().T
            probs, z = logits.softmax(-1), logits.logsumexp(-1).square().mean()
        weight, chosen = probs.topk(K, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=E)
        rows = order // K
        parts = torch.split(x[rows], counts.tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y * weight.flatten()[order].unsqueeze(-1).to(y.dtype)
        out = torch.zeros_like(x).index_add(0, rows, y.to(x.dtype))
        balance = E * (counts.float() / chosen.numel() * probs.mean(0)).sum()
        return out.view(shape), torch.stack((balance, z))


class Block(nn.Module):
    """One layer: attention, then a dense or a sparse feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.is_sparse = config.num_experts > 0
        if self.is_sparse:
            self.block_sparse_moe = SparseMlp(config)
        else:
            self.mlp = DenseMlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, H]. Returns the output and the router's losses, if any."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y, losses = (self.block_sparse_moe if self.is_sparse else self.mlp)(self.post_attention_layernorm(x))
        return x + y, losses


class Body(nn.Module):
    """Everything but the head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        freq = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angle = torch.arange(config.context).float()[:, None] * freq[None, :]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """ids: int64 [B, T]. Returns final hidden states [B, T, H] and the routers' two losses, means over layers."""
        x = self.embed_tokens(ids).to(dtype)
        cos, sin = self.cos[: ids.shape[1]].to(dtype), self.sin[: ids.shape[1]].to(dtype)
        total = torch.zeros(2, device=ids.device)
        for layer in self.layers:
            x, losses = layer(x, cos, sin)
            if losses is not None:
                total = total + losses
        return self.norm(x), total / len(self.layers)


class Llama(nn.Module):
    """Llama or Mixtral with tied embeddings; state_dict() is the Hugging Face checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.apply(_init)
        for name, parameter in self.named_parameters():  # each block starts as the identity
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
                nn.init.zeros_(parameter)

    def set_routing(self, top_k: int, aux_coef: float) -> None:
        """Change what no weight depends on: experts per token, and the weight of the balance loss."""
        self.config = replace(self.config, top_k=top_k, aux_coef=aux_coef)
        for module in self.modules():
            if isinstance(module, SparseMlp):
                module.config = self.config

    @property
    def num_parameters(self) -> int:
        """Trained numbers, all experts counted."""
        return sum(parameter.numel() for parameter in self.parameters())


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
