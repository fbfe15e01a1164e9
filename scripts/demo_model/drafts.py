"""Training what drafts for the model: an EAGLE-3 head and a smaller model, both on the model's own answers.

The model asks itself questions and answers them, so no other text is used, and what is learnt is what it will say. Both
learn the model's distribution at every position of an answer. The head is trained over several drafts in a row, as it
will be used: after the first it reads its own hidden states (training-time test, Li et al. 2025).

The model's hidden states are computed once and kept in a file, so that a step of training computes the head alone.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vllmlite import LLM, SamplingParams
from vllmlite.hub import BUILT_IN

from .chat import ASSISTANT, END, USER
from .model import MLP, Llama, Shape, _rotate
from .release import sha256, tools
from .sources import RESULT
from .training import Muon

TURN = 1
"""The id that begins every turn of a conversation."""
SMALL = Shape(
    hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
"""Sizes of the draft model."""


@dataclass(frozen=True, slots=True)
class DraftRecipe:
    """Parameters of the data and of both trainings."""

    seed: int = 1
    answers: int = 10000
    draft_vocab: int = 2560
    """Ids that the head can draft: the most frequent ones of the answers."""
    states: tuple[int, ...] = (2, 5, 7)
    """Layers of the model whose inputs the head reads."""
    drafts: int = 3
    """Drafts in a row that the head is trained for."""
    inner: int = 512
    """Size of the head's MLP."""
    steps: int = 807
    tokens: int = 2048
    """Tokens of a step, with padding."""
    matrix_rate: float = 0.01
    other_rate: float = 0.004


def answers(
    recipe: DraftRecipe, at_once: int = 1000, report: Callable[[str], None] = print
) -> list[list[int]]:
    """Return the ids of conversations of the built-in model with itself; every second answer is the greedy one."""
    llm = LLM(max_model_len=512, seed=recipe.seed, max_num_seqs=128)
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
    return found[: recipe.answers]


def answer_start(text: Sequence[int]) -> int:
    """Return where the answer of a conversation begins: after the last turn's mark, its role and a line break."""
    return max(index for index, token_id in enumerate(text) if token_id == TURN) + 3


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
    ) -> Tensor:
        """Compute the n-th draft of every position, where ``earlier`` has the keys and values of the drafts before, and
        gets those of this one. Returns the hidden states, which the next draft reads."""
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
        return torch.as_tensor(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states to logits of the draft vocabulary."""
        return torch.as_tensor(self.lm_head(self.norm(hidden)))


@torch.no_grad()
def states(model: Llama, ids: Tensor, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the inputs of ``layers`` side by side, and the output of the final norm."""
    x, kept, rope = model.model.embed_tokens(ids), {}, model.rope(ids.shape[1], ids.device)
    for index, layer in enumerate(model.model.layers):
        kept[index] = x
        x = layer(x, rope, None)
    return torch.cat([kept[layer] for layer in layers], dim=-1), model.model.norm(x)


@dataclass(frozen=True, slots=True)
class Fit:
    """The record of a training run."""

    steps: int
    losses: list[float]
    """Mean losses of the last steps, for each draft in a row."""
    device: str
    seconds: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations side by side, padded to the longest."""

    ids: Tensor
    wide: Tensor
    """Inputs of the layers that the head reads, side by side: [rows, length, layers * hidden]."""
    final: Tensor
    """Outputs of the final norm: [rows, length, hidden]."""
    rows: Tensor
    """Rows of the tokens from which a token of an answer follows."""
    places: Tensor
    """Their places in the rows."""


class Conversations:
    """Conversations and the model's hidden states for them."""

    def __init__(self, model: Llama, texts: Sequence[list[int]], recipe: DraftRecipe, cache: Path) -> None:
        """Compute the hidden states and store them in the directory ``cache``, in bf16."""
        cache.mkdir(parents=True, exist_ok=True)
        self.texts, self._recipe = texts, recipe
        self._device = next(model.parameters()).device
        self._bounds = np.cumsum([0, *map(len, texts)])
        size, count = model.shape.hidden_size, int(self._bounds[-1])
        self._wide, self._final = (
            torch.from_file(str(cache / name), True, count * columns, dtype=torch.bfloat16).view(-1, columns)
            for name, columns in (("wide.bf16", len(recipe.states) * size), ("final.bf16", size))
        )
        for numbers in self._grouped(np.arange(len(texts))):
            ids = self._padded(numbers)
            with torch.autocast(self._device.type, torch.bfloat16):
                found = states(model, ids, recipe.states)
            for row, number in enumerate(numbers):
                for kept, part in zip((self._wide, self._final), found, strict=True):
                    kept[self._span(number)] = part[row, : len(texts[number])].to("cpu", torch.bfloat16)

    def batches(self) -> Iterator[Batch]:
        """Yield batches for ever, each of conversations of about the same length."""
        draw = np.random.default_rng(self._recipe.seed)
        while True:
            groups = self._grouped(draw.permutation(len(self.texts)))
            for group in draw.permutation(len(groups)):
                yield self._batch(groups[group])

    def _grouped(self, order: NDArray[np.int64]) -> list[list[int]]:
        """Group conversations by length, as many as make up the recipe's tokens when padded."""
        lengths = np.array([len(self.texts[number]) for number in order])
        groups, group = list[list[int]](), list[int]()
        for number in order[np.argsort(lengths, kind="stable")]:
            if (len(group) + 1) * len(self.texts[number]) > self._recipe.tokens and group:
                groups.append(group)
                group = []
            group.append(int(number))
        return [*groups, group]

    def _batch(self, numbers: list[int]) -> Batch:
        wide, final = (
            pad_sequence([part[self._span(number)] for number in numbers], True).to(self._device)
            for part in (self._wide, self._final)
        )
        places = [
            torch.arange(answer_start(self.texts[number]) - 1, len(self.texts[number]) - 1)
            for number in numbers
        ]
        rows = [torch.full_like(each, row) for row, each in enumerate(places)]
        return Batch(
            self._padded(numbers),
            wide,
            final,
            torch.cat(rows).to(self._device),
            torch.cat(places).to(self._device),
        )

    def _padded(self, numbers: list[int]) -> Tensor:
        return pad_sequence([torch.tensor(self.texts[number]) for number in numbers], True).to(self._device)

    def _span(self, number: int) -> slice:
        return slice(self._bounds[number], self._bounds[number + 1])


def head_losses(
    head: Head, model: Llama, batch: Batch, vocabulary: Tensor, draftable: Tensor, drafts: int
) -> list[Tensor]:
    """Return the mean loss of each draft in a row, over the tokens of answers that the head can draft.

    ``vocabulary`` has the ids of the draft vocabulary; ``draftable`` says of every id whether it is one of them."""
    rows, places = batch.rows, batch.places
    chosen = draftable[batch.ids[rows, places + 1]]
    rows, places = rows[chosen], places[chosen]
    with torch.no_grad():
        wanted = F.linear(
            batch.final[rows, places], model.model.embed_tokens.weight[vocabulary].to(batch.final.dtype)
        )
        wanted = wanted.float().softmax(-1)
        embedded = F.pad(model.model.embed_tokens(batch.ids), (0, 0, 0, drafts))
    count = batch.ids.shape[1] - 2
    rope = model.rope(count + drafts, batch.ids.device)
    hidden = head.fc(batch.wide[:, :count]).float()
    losses: list[Tensor] = []
    earlier: list[tuple[Tensor, Tensor]] = []
    for number in range(drafts):
        turned = (rope[0][number : number + count], rope[1][number : number + count])
        hidden = head(embedded[:, number + 1 : number + 1 + count], hidden, turned, earlier)
        guessed = head.logits(hidden[rows, places - 1 - number])
        losses.append(F.cross_entropy(guessed.float(), wanted))
    return losses


def small_losses(small: Llama, model: Llama, batch: Batch) -> list[Tensor]:
    """Return the mean loss of the draft model against the model's distribution."""
    with torch.no_grad():
        wanted = F.linear(
            batch.final[batch.rows, batch.places].float(), model.model.embed_tokens.weight
        ).softmax(-1)
    return [F.cross_entropy(small(batch.ids)[batch.rows, batch.places].float(), wanted)]


def fit(
    module: nn.Module, losses_of: Callable[[Batch], list[Tensor]], data: Conversations, recipe: DraftRecipe,
    seconds: float = float("inf"), report: Callable[[str], None] = print,
) -> Fit:  # fmt: skip
    """Train ``module`` for the recipe's steps, or for ``seconds``; the rate falls linearly to zero."""
    tables = [weight for name, weight in module.named_parameters() if "head" in name or "embed" in name]
    matrices = [w for w in module.parameters() if w.ndim == 2 and all(w is not table for table in tables)]
    others = [weight for weight in module.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers = [
        (Muon(matrices, lr=0.0, weight_decay=0.1), recipe.matrix_rate),
        (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0), recipe.other_rate),
    ]
    device = next(module.parameters()).device
    begun, done, shown = time.monotonic(), 0.0, list[Tensor]()
    for step, batch in enumerate(data.batches(), 1):
        with torch.autocast(device.type, torch.bfloat16):
            losses = torch.stack(losses_of(batch))
        losses.mean().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / 50) * (1 - done)
            with torch.autocast(device.type, torch.bfloat16):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shown.append(losses.detach())
        done = max(step / recipe.steps, (time.monotonic() - begun) / seconds)
        if len(shown) == 50 or done >= 1:
            losses_now = [round(loss, 3) for loss in torch.stack(shown).mean(0).tolist()]
            report(f"step {step}, {done:.0%}: losses {losses_now}")
            shown.clear()
        if done >= 1:
            break
    return Fit(step, losses_now, device.type, round(time.monotonic() - begun))


def most_frequent(texts: Sequence[list[int]], count: int, vocab_size: int) -> NDArray[np.int64]:
    """Return the ``count`` most frequent ids of answers, ascending."""
    ids = np.concatenate([np.array(text[answer_start(text) :], np.int64) for text in texts])
    frequency = np.bincount(ids, minlength=vocab_size)
    return np.sort(np.argsort(-frequency, kind="stable")[:count]).astype(np.int64)


def train_head(
    model: Llama, data: Conversations, recipe: DraftRecipe, target: Path, seconds: float = float("inf")
) -> None:
    """Train a head for the recipe's steps, or for ``seconds``, and write it to ``target``."""
    torch.manual_seed(recipe.seed)
    device = next(model.parameters()).device
    ids = most_frequent(data.texts, recipe.draft_vocab, model.shape.vocab_size)
    vocabulary = torch.from_numpy(ids).to(device)
    draftable = torch.zeros(model.shape.vocab_size, dtype=torch.bool, device=device)
    draftable[vocabulary] = True
    head = Head(recipe, model.shape).to(device)
    with torch.no_grad():
        head.lm_head.weight.copy_(model.model.embed_tokens.weight[vocabulary])
        head.norm.weight.copy_(model.model.norm.weight)
    record = fit(
        head,
        lambda batch: head_losses(head, model, batch, vocabulary, draftable, recipe.drafts),
        data,
        recipe,
        seconds,
    )
    weights = _stored(head) | {"d2t": torch.from_numpy(ids - np.arange(len(ids)))}
    config = model.shape.config() | {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "intermediate_size": recipe.inner,
        "tie_word_embeddings": False, "draft_vocab_size": recipe.draft_vocab,
        "eagle_aux_hidden_state_layer_ids": list(recipe.states),
    }  # fmt: skip
    _write(target, weights, config)
    write_manifest(target, recipe, record)


def train_small(
    model: Llama,
    data: Conversations,
    recipe: DraftRecipe,
    target: Path,
    tokenizer: Path,
    seconds: float = float("inf"),
) -> None:
    """Train a draft model for the recipe's steps, or for ``seconds``; write it to ``target`` with the model's
    tokenizer."""
    small = Llama(SMALL, recipe.seed).to(next(model.parameters()).device)
    record = fit(small, lambda batch: small_losses(small, model, batch), data, recipe, seconds)
    _write(target, _stored(small), SMALL.config())
    (target / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_manifest(target, recipe, record)


def write_manifest(target: Path, recipe: DraftRecipe, record: Fit) -> None:
    """Write how the checkpoint in ``target`` was made, and the digests of its files."""
    files = sorted(path for path in target.iterdir() if path.name != "manifest.json")
    manifest = {
        "licence": RESULT,
        "made_from": "answers of the built-in model to its own questions",
        "model": sha256(BUILT_IN / "model.safetensors"),
        "files": {path.name: sha256(path) for path in files},
        "recipe": asdict(recipe),
        "training": asdict(record),
        "tools": tools(),
    }
    (target / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _stored(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in module.named_parameters()
    }


def _write(target: Path, weights: dict[str, Tensor], config: dict[str, object]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
