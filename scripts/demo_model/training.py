"""Training: Muon for the matrices inside the layers, AdamW for the rest, in two stages over whole documents."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .model import Llama, Shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """All parameters of the training.

    The learning rate is constant after `warmup` and falls linearly to zero over the last `decay` of the `steps`; the
    last `finish` of them are the second stage, with rows of the whole context.
    """

    seed: int = 1
    steps: int = 4500
    tokens_per_step: int = 65536
    row: int = 1024
    matrix_rate: float = 0.006
    other_rate: float = 0.004
    weight_decay: float = 0.5
    warmup: int = 200
    decay: float = 0.5
    finish: float = 0.1
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The factor on the learning rates at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.steps * self.decay))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Concatenated tokenised documents: the i-th is `ids[bounds[i]:bounds[i + 1]]`, shown `repeats[i]` times an
    epoch."""

    ids: NDArray[np.uint16]
    bounds: NDArray[np.int64]
    repeats: NDArray[np.int64]


@dataclass(slots=True)
class Log:
    """The record of a training run."""

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def rows(tokens: Tokens, length: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """Endless rows of `length` + 1 tokens with the document number of each; documents are shuffled in every epoch.

    A document that is cut at the end of a row continues in the next as if it were another; rows are independent.
    """
    left_ids, left_numbers = np.empty(0, np.uint16), np.empty(0, np.int32)
    for epoch in itertools.count():
        every = np.repeat(np.arange(len(tokens.repeats)), tokens.repeats)
        order = np.random.default_rng((seed, epoch)).permutation(every)
        starts, ends = tokens.bounds[order], tokens.bounds[order + 1]
        shuffled = (tokens.ids[start:end] for start, end in zip(starts, ends, strict=True))
        numbered = np.repeat(np.arange(1, len(order) + 1, dtype=np.int32), ends - starts)
        ids, numbers = np.concatenate([left_ids, *shuffled]), np.concatenate([left_numbers, numbered])
        whole = len(ids) // (length + 1) * (length + 1)
        for first in range(0, whole, length + 1):
            part = slice(first, first + length + 1)
            yield ids[part].astype(np.int64), numbers[part]
        left_ids, left_numbers = ids[whole:], -np.abs(numbers[whole:])


def batches(tokens: Tokens, length: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `count` rows: token ids and document numbers, both [count, length + 1]."""
    source = rows(tokens, length, seed)
    while True:
        ids, numbers = zip(*itertools.islice(source, count), strict=True)
        yield torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(numbers))


def document_loss(model: nn.Module, ids: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean loss (nats per token), where each token is predicted from those before it in its own document."""
    inside = numbers[:, :-1, None] == numbers[:, None, :-1]
    mask = torch.zeros(inside.shape, dtype=dtype, device=ids.device).masked_fill_(
        ~inside.tril(), float("-inf")
    )
    targets = torch.where(numbers[:, 1:] == numbers[:, :-1], ids[:, 1:], -100)
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(ids[:, :-1], mask[:, None])
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps (Muon), for matrices; all matrices of one shape are updated at once."""

    def __init__(
        self, weights: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in weights:
            alike.setdefault(tuple(weight.shape), []).append(weight)
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": group} for group in alike.values()], settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight; steps have the length of AdamW's, so that the learning rates are comparable."""
        for group in self.param_groups:
            weights: list[Tensor] = group["params"]
            gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            state = self.state[weights[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - group["momentum"])
            update = (
                orthogonal(gradients.lerp(momentum, group["momentum"]))
                * 0.2
                * max(gradients.shape[-2:]) ** 0.5
            )
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(update.unbind()), alpha=-group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [count, rows, columns] with singular values brought near one, by five Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def train(
    recipe: Recipe,
    shape: Shape,
    first: Tokens,
    second: Tokens,
    held_out: Tokens,
    device: torch.device,
    stop_after: int = 0,
    rows_at_once: int = 64,
    compiled: bool = False,
    report: Callable[[str], None] = print,
) -> tuple[Llama, Log]:
    """Run the recipe, or its first `stop_after` steps, on a GPU in bf16 or a CPU in fp32, from the same initial
    weights."""
    model = Llama(shape, recipe.seed).to(device)
    loss_of = torch.compile(document_loss, dynamic=False) if compiled else document_loss
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    optimizers = make_optimizers(model, recipe)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    context = shape.max_position_embeddings
    early = batches(first, recipe.row, recipe.tokens_per_step // recipe.row, recipe.seed)
    late = batches(second, context, recipe.tokens_per_step // context, recipe.seed + 1)
    turn = recipe.steps - int(recipe.steps * recipe.finish)
    log, recent, begun = Log(), list[Tensor](), time.monotonic()
    for step in range(min(recipe.steps, stop_after or recipe.steps)):
        ids, numbers = (part.to(device) for part in next(early if step < turn else late))
        at_once = max(1, rows_at_once * recipe.row // (ids.shape[1] - 1))
        loss = torch.zeros((), device=device)
        for part, of in zip(torch.split(ids, at_once), torch.split(numbers, at_once), strict=True):
            part_loss = loss_of(model, part, of, dtype) * (len(part) / len(ids))
            part_loss.backward()  # type: ignore[no-untyped-call]
            loss += part_loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer, base in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.tokens += ids[:, 1:].numel()
        recent.append(loss)
        if step < 10:
            log.losses.append(round(float(loss), 5))
        if step < 10 or step % 100 == 99:
            seconds, mean = time.monotonic() - begun, float(torch.stack(recent).mean())
            minutes_left = seconds / log.tokens * (recipe.steps - step - 1) * recipe.tokens_per_step / 60
            speed = f"{log.tokens / seconds / 1000:.1f}k tokens/s, {minutes_left:.0f} minutes left"
            report(f"step {step + 1} of {recipe.steps}: loss {mean:.4f}, {speed}")
            recent.clear()
        if step % 1000 == 999 or step + 1 == recipe.steps:
            log.held_out.append((step + 1, round(evaluate(model, held_out, recipe.row, device), 4)))
            report(f"held-out loss {log.held_out[-1][1]:.4f} nats per token")
    log.seconds = round(time.monotonic() - begun, 1)
    return model, log


def make_optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for the embedding and the norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "layers" not in name]
    return [
        Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def evaluate(model: Llama, tokens: Tokens, row: int, device: torch.device) -> float:
    """The loss over all of `tokens`, in nats per token."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    count = len(tokens.ids) // (row + 1)
    total, seen = 0.0, 0
    for ids, numbers in itertools.islice(batches(tokens, row, 16, 0), max(1, count // 16)):
        asked = int((numbers[:, 1:] == numbers[:, :-1]).sum())
        total += float(document_loss(model, ids.to(device), numbers.to(device), dtype)) * asked
        seen += asked
    return total / seen
