"""The errors vllmlite raises on purpose. Each message says what was wrong, with what value, and what would do."""

from __future__ import annotations

from typing import Any


class VllmliteError(Exception):
    """Base of every error that is the caller's or the machine's to mend; anything else is a bug."""


class ParameterError(VllmliteError, ValueError):
    """A field has a value outside its accepted range. The request or engine that carried it was not started."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        """Name the ``field``, show the ``value`` (shortened), and say what is ``accepted``."""
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {accepted}")
        self.field = field
        self.value = value
        self.accepted = accepted

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: errors cross from the engine's process to its user's."""
        return type(self), (self.field, self.value, self.accepted)

    def renamed(self, field: str) -> ParameterError:
        """The same error of a field of another name."""
        return type(self)(field, self.value, self.accepted)


class ContextLengthError(ParameterError):
    """A prompt is longer than the model's context. Clients look for it, and shorten their conversation."""

    def __init__(
        self, field: str, num_tokens: int, max_prompt_tokens: int, max_model_len: int, exact: bool = True
    ) -> None:
        """The prompt has ``num_tokens``, or at least so many unless ``exact``; ``max_prompt_tokens`` would fit."""
        least = "" if exact else "at least "
        super().__init__(
            field,
            f"{least}{num_tokens} tokens",
            f"must be at most {max_prompt_tokens} tokens: the maximum context length is {max_model_len} tokens "
            "(max_model_len)",
        )
        self.num_tokens = num_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.max_model_len = max_model_len
        self.exact = exact

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle."""
        return type(self), (
            self.field,
            self.num_tokens,
            self.max_prompt_tokens,
            self.max_model_len,
            self.exact,
        )

    def renamed(self, field: str) -> ContextLengthError:
        """The same error of a field of another name."""
        return type(self)(field, self.num_tokens, self.max_prompt_tokens, self.max_model_len, self.exact)


class ModelError(VllmliteError):
    """A model cannot be found, read or run: bad checkpoint, unknown architecture, unusable configuration."""


class BackendError(VllmliteError):
    """No compute backend can do what was asked: a missing device, an operation or dtype it lacks, no memory."""


class EngineDeadError(VllmliteError):
    """The engine has been shut down, or has failed for good: it takes no more requests."""


class EngineUseError(VllmliteError):
    """An engine was called where it cannot be: within a call of the same thread, or in a forked process."""


EXTRAS = {
    "torch": ("torch", "transformers"),
    "server": ("fastapi", "uvicorn", "prometheus_client", "httpx"),
    "guided": ("xgrammar",),
}
"""Modules that pip installs with an extra of vllmlite, by the extra."""


def not_installed(module: str) -> str:
    """Say that a Python ``module`` is not installed, and how Debian and pip install it."""
    distribution = module.replace("_", "-")
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    pip = f"vllmlite[{extra}]" if extra else distribution
    return f"the Python package {module} is not installed (Debian: python3-{distribution}; pip: {pip})"
