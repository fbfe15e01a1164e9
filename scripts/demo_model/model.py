"""The model: a small Llama in plain PyTorch, whose parameters have the names of checkpoint tensors."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, with the names that a Hugging Face config.json has."""

    vocab_size: int = 6144
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self), "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None,
            "tie_word_embeddings": True, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": [0, 2],
            "pad_token_id": 0, "torch_dtype": "bfloat16", "use_cache": True,
        }  # fmt: skip


class Attention(nn.Module):
    """Causal grouped-query attention with rotary position embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.groups = shape.num_attention_heads // shape.num_key_value_heads
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend from `x` [rows, length, hidden]. `mask` is added to the scores [rows, 1, length, length]; None is
        causal."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, rope), _rotate(key, rope)
        key, value = (part.repeat_interleave(self.groups, dim=1) for part in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return torch.as_tensor(self.o_proj(out.transpose(1, 2).flatten(-2)))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    """The gated feed-forward part of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., hidden] to [..., hidden]."""
        return torch.as_tensor(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    """Attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """One layer; shapes as in `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask)
        return torch.as_tensor(x + self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """The embedding, the layers and the final norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class Llama(nn.Module):
    """The whole model; its output layer is tied to the embedding."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                spread = 0.02 / math.sqrt(2 * shape.num_hidden_layers) if into_residual else 0.02
                nn.init.normal_(weight, std=spread, generator=generator)

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary positions, [length, head_dim]."""
        steps = (
            torch.arange(0, self.shape.head_dim, 2, device=device, dtype=torch.float32) / self.shape.head_dim
        )
        angles = torch.outer(
            torch.arange(length, device=device, dtype=torch.float32), self.shape.rope_theta**-steps
        )
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ids [rows, length] to logits [rows, length, vocabulary]; `mask` as in `Attention`."""
        x = self.model.embed_tokens(ids)
        rope = self.rope(ids.shape[1], ids.device)
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
