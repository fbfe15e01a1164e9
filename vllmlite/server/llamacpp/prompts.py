"""llama.cpp's prompts: text, token ids, a mixture of both, an object with a text, or a list of these."""

from __future__ import annotations

from typing import Any

from vllmlite.errors import ParameterError
from vllmlite.server.service import Service
from vllmlite.tokenizers.tokenizer import Tokenizer

FORMS = 'must be text, token ids, a list of both, {"prompt_string": text}, or a list of these'


async def encode_prompts(service: Service, given: Any) -> list[dict[str, Any]]:
    """Return every prompt of a request with its ids. Raises :class:`ParameterError`."""
    prompts = [_plain(prompt) for prompt in (given if _is_list_of_prompts(given) else [given])]
    service.check_num_prompts(len(prompts))
    ready = []
    for prompt in prompts:
        if isinstance(prompt, list) and str in map(type, prompt):
            service.check_num_ids(sum(type(part) is int for part in prompt))
            characters = sum(len(part) for part in prompt if isinstance(part, str))
            prompt = await service.tokenised(characters, _mixed_ids, service.tokenizer, prompt)
        ready.append(prompt)
    return await service.encode_all(ready)


def _is_list_of_prompts(given: Any) -> bool:
    """Return whether ``given`` is a list that is not one prompt of ids, or of ids and texts."""
    return isinstance(given, list) and not _is_tokens(given)


def _is_tokens(given: list[Any]) -> bool:
    return {int} <= set(map(type, given)) <= {int, str}


def _plain(prompt: Any) -> str | list[Any]:
    """Return a prompt as text or a list, without an object around it."""
    if isinstance(prompt, dict):
        if prompt.get("multimodal_data"):
            raise ParameterError(
                "prompt.multimodal_data", prompt["multimodal_data"], "only text is supported"
            )
        prompt = prompt.get("prompt_string")
        if not isinstance(prompt, str):
            raise ParameterError("prompt.prompt_string", prompt, "must be text")
    if isinstance(prompt, str) or (isinstance(prompt, list) and _is_tokens(prompt)):
        return prompt
    raise ParameterError("prompt", prompt, FORMS)


def _mixed_ids(tokenizer: Tokenizer, parts: list[int | str]) -> list[int]:
    """Return the ids of texts and of ids between them; special tokens are added only if it begins with a text."""
    ids: list[int] = []
    for index, part in enumerate(parts):
        ids += tokenizer.encode(part, index == 0) if isinstance(part, str) else [part]
    return ids
