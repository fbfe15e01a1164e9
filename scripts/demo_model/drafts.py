"""Training what drafts for the model: an EAGLE-3 head and a smaller model, both on the model's own answers.

The model asks itself questions and answers them, so no other text is used, and what is learnt is what it will say. Both
learn the model's distribution at every position. The head is trained over several drafts in a row, as it will be used:
after the first it reads its own hidden states (training-time test, Li et al. 2025).
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vllmlite import LLM, SamplingParams

from .chat import ASSISTANT, END, USER
from .model import MLP, Llama, Shape, _rotate

SMALL = Shape(
    hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
"""Sizes of the draft model."""


@dataclass(frozen=True, slots=True)
class DraftRecipe:
    """Parameters of the data and of both trainings."""

    seed: int = 1
    answers: int = 20000
    draft_vocab: int = 2048
    """Ids that the head can draft: the most frequent ones."""
    states: tuple[int, ...] = (2, 4, 5)
    """Layers of the model whose inputs the head reads."""
    drafts: int = 4
    """Drafts in a row that the head is trained for."""
    inner: int = 512
    """Size of the head's MLP."""
    steps: int = 2000
    rows: int = 16
    """Rows in a step."""
    row: int = 256
    """Tokens of a row."""
    rate: float = 0.002


def answers(
    recipe: DraftRecipe, at_once: int = 256, report: Callable[[str], None] = print
) -> list[list[int]]:
    """Return the ids of conversations of the built-in model with itself; every second answer is the greedy one."""
    llm = LLM(max_model_len=512, seed=recipe.seed)
    encode = llm.get_tokenizer().encode
    begin, between = list(encode(USER)), list(encode(END + ASSISTANT))
    ask, found = SamplingParams(temperature=1.0, max_tokens=60, detokenize=False), list[list[int]]()
    ways = [SamplingParams(temperature=t, max_tokens=200, detokenize=False) for t in (0.0, 0.7)]
    while len(found) < recipe.answers:
        asked = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": begin}] * at_once, ask)]
        prompts = [
            begin + list(each.token_ids)[:-1] + between for each in asked if each.finish_reason == "stop"
        ]
        given = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], [ways[i % 2] for i in range(len(prompts))]
        )
        found += [
            prompt + list(each.outputs[0].token_ids) for prompt, each in zip(prompts, given, strict=True)
        ]
        report(f"{len(found)} answers")
    return found


class Head(nn.Module):
    """An EAGLE-3 head, whose parameters have the names of the published checkpoints."""

    def __init__(self, recipe: DraftRecipe, shape: Shape) -> None:
        super().__init__()
        hidden, self.head_dim = shape.hidden_size, shape.head_dim
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.groups = shape.num_attention_heads // shape.num_key_value_heads
        layer = nn.Module()
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, nn.RMSNorm(hidden, eps=shape.rms_norm_eps))
        attention = nn.Module()
        for part, size in (("q", queries), ("k", keys), ("v", keys)):
            setattr(attention, f"{part}_proj", nn.Linear(2 * hidden, size, bias=False))
        attention.o_proj = nn.Linear(queries, hidden, bias=False)
        layer.self_attn, layer.mlp = attention, MLP(Shape(hidden_size=hidden, intermediate_size=recipe.inner))
        self.midlayer: Any = layer
        self.fc = nn.Linear(len(recipe.states) * hidden, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, recipe.draft_vocab, bias=False)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        earlier: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Compute the n-th draft of every position, where ``earlier`` has the keys and values of the drafts before, and
        gets those of this one. Returns logits and the hidden states for the next draft."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), dim=-1)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = _rotate(query, rope), _rotate(key, rope)
        key, value = (part.repeat_interleave(self.groups, dim=1) for part in (key, value))
        earlier.append((key, value))
        # A chain sees the positions up to its beginning, and its own drafts.
        (first, values), *own = earlier
        scores = query @ first.mT
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
        scores = torch.cat([scores, *((query * key).sum(-1, keepdim=True) for key, _ in own)], dim=-1)
        weights = (scores * self.head_dim**-0.5).softmax(-1)
        length = first.shape[-2]
        out = weights[..., :length] @ values
        for number, (_, value) in enumerate(own):
            out = out + weights[..., length + number, None] * value
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(-2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.lm_head(self.norm(hidden)), hidden


@torch.no_grad()
def states(model: Llama, ids: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the inputs of ``layers`` side by side, and the logits."""
    x, kept, rope = model.model.embed_tokens(ids), {}, model.rope(ids.shape[1], ids.device)
    for index, layer in enumerate(model.model.layers):
        kept[index] = x
        x = layer(x, rope, None)
    logits = F.linear(model.model.norm(x), model.model.embed_tokens.weight)
    return torch.cat([kept[layer] for layer in layers], dim=-1), logits


def head_losses(
    head: Head, model: Llama, ids: Tensor, vocabulary: Tensor, recipe: DraftRecipe
) -> list[Tensor]:
    """Return the mean loss of each draft in a row."""
    wide, logits = states(model, ids, recipe.states)
    hidden, rope = head.fc(wide), model.rope(ids.shape[1] + recipe.drafts, ids.device)
    embedded = model.model.embed_tokens(ids).detach()
    losses: list[Tensor] = []
    earlier: list[tuple[Tensor, Tensor]] = []
    for number in range(recipe.drafts):
        count = ids.shape[1] - recipe.drafts - 1
        if number == 0:
            hidden = hidden[:, :count]
        turned = tuple(part[number : number + count] for part in rope)
        guessed, hidden = head(embedded[:, number + 1 : number + 1 + count], hidden, turned, earlier)
        wanted = logits[:, number + 1 : number + 1 + count, vocabulary].float().softmax(-1)
        losses.append(-(wanted * guessed.float().log_softmax(-1)).sum(-1).mean())
    return losses


def small_losses(small: Llama, model: Llama, ids: Tensor) -> list[Tensor]:
    """Return the mean loss of the draft model against the model's distribution."""
    with torch.no_grad():
        wanted = model(ids).float().softmax(-1)
    return [-(wanted * small(ids).float().log_softmax(-1)).sum(-1).mean()]


def batches(texts: list[list[int]], recipe: DraftRecipe) -> Iterator[Tensor]:
    """Yield batches ``[rows, row]`` for ever; each row has one text after another."""
    draw = np.random.default_rng(recipe.seed)
    while True:
        order = draw.permutation(len(texts))
        ids: NDArray[np.int64] = np.concatenate([np.array(texts[index], np.int64) for index in order])
        size = recipe.rows * recipe.row
        for first in range(0, len(ids) - size + 1, size):
            yield torch.from_numpy(ids[first : first + size].reshape(recipe.rows, recipe.row))


def fit(
    module: nn.Module, losses_of: Callable[[Tensor], list[Tensor]], texts: list[list[int]], recipe: DraftRecipe,
    seconds: float = float("inf"), report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Train ``module`` for the recipe's steps, or for ``seconds``; the rate falls linearly to zero."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01)
    device = next(module.parameters()).device
    begun, source, step, done = time.monotonic(), batches(texts, recipe), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 50) * (1 - done)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = losses_of(next(source).to(device))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        done = max(step / recipe.steps, (time.monotonic() - begun) / seconds)
        if step % 50 == 0:
            shown = " ".join(f"{float(loss):.3f}" for loss in losses)
            report(f"step {step}, {done:.0%}: losses {shown}")


def most_frequent(texts: list[list[int]], count: int, vocab_size: int) -> NDArray[np.int64]:
    """Return the ``count`` most frequent ids, ascending."""
    frequency = np.bincount(np.concatenate([np.array(text) for text in texts]), minlength=vocab_size)
    return np.sort(np.argsort(-frequency, kind="stable")[:count]).astype(np.int64)


def train_head(
    model: Llama, texts: list[list[int]], recipe: DraftRecipe, seconds: float, target: Path
) -> None:
    """Train a head and write it to ``target``."""
    torch.manual_seed(recipe.seed)
    device, ids = (
        next(model.parameters()).device,
        most_frequent(texts, recipe.draft_vocab, model.shape.vocab_size),
    )
    head, vocabulary = Head(recipe, model.shape).to(device), torch.from_numpy(ids).to(device)
    with torch.no_grad():
        head.lm_head.weight.copy_(model.model.embed_tokens.weight[vocabulary])
    fit(head, lambda rows: head_losses(head, model, rows, vocabulary, recipe), texts, recipe, seconds)
    weights = _stored(head) | {"d2t": torch.from_numpy(ids - np.arange(len(ids)))}
    config = model.shape.config() | {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "intermediate_size": recipe.inner,
        "tie_word_embeddings": False, "draft_vocab_size": recipe.draft_vocab,
        "eagle_aux_hidden_state_layer_ids": list(recipe.states),
    }  # fmt: skip
    _write(target, weights, config)


def train_small(
    model: Llama, texts: list[list[int]], recipe: DraftRecipe, seconds: float, target: Path, tokenizer: Path
) -> None:
    """Train a draft model and write it to ``target``, with the model's tokenizer."""
    small = Llama(SMALL, recipe.seed).to(next(model.parameters()).device)
    fit(small, lambda rows: small_losses(small, model, rows), texts, recipe, seconds)
    _write(target, _stored(small), SMALL.config())
    (target / "tokenizer.json").write_bytes(tokenizer.read_bytes())


def _stored(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in module.named_parameters()
    }


def _write(target: Path, weights: dict[str, Tensor], config: dict[str, object]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
