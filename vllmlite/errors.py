"""The errors that vllmlite raises deliberately. Messages name what is wrong, the value, and what is accepted."""

from __future__ import annotations

from typing import Any


class VllmliteError(Exception):
    """Base of all errors that the user can resolve, or that come from the machine; any other exception is a bug."""


class ParameterError(VllmliteError, ValueError):
    """A parameter has a value outside its accepted range; the request or engine was not started."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        """``field`` is the parameter's name and ``value`` its value, which the message shortens; ``accepted`` says what
        is wrong with it and what is accepted."""
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}={shown}: {accepted}")
        self.field = field
        self.value = value
        self.accepted = accepted

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the error picklable, because it is sent from the engine's process to its client."""
        return type(self), (self.field, self.value, self.accepted)

    def renamed(self, field: str) -> ParameterError:
        """Return the same error with another field name."""
        return type(self)(field, self.value, self.accepted)


class ContextLengthError(ParameterError):
    """A prompt is longer than the model's context. Clients recognise this error and then shorten their conversation."""

    def __init__(
        self, field: str, num_tokens: int, max_prompt_tokens: int, max_model_len: int, exact: bool = True
    ) -> None:
        """``num_tokens`` is the length of the prompt, or a lower bound unless ``exact``; a prompt of
        ``max_prompt_tokens`` would fit into ``max_model_len``."""
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
        """Make the error picklable."""
        return type(self), (
            self.field,
            self.num_tokens,
            self.max_prompt_tokens,
            self.max_model_len,
            self.exact,
        )

    def renamed(self, field: str) -> ContextLengthError:
        """Return the same error with another field name."""
        return type(self)(field, self.num_tokens, self.max_prompt_tokens, self.max_model_len, self.exact)


class ModelError(VllmliteError):
    """A model cannot be found, read or run: bad checkpoint, unknown architecture, unusable configuration."""


class BackendError(VllmliteError):
    """No backend can do what was asked: missing device, unsupported op or dtype, or not enough memory."""


class EngineDeadError(VllmliteError):
    """The engine was shut down or has failed for good; it accepts no more requests."""


class EngineSleepingError(VllmliteError):
    """The engine sleeps, and serves no request until it is woken up."""

    def __init__(
        self, message: str = "the engine sleeps: call wake_up first (a server: POST /wake_up)"
    ) -> None:
        super().__init__(message)


class EngineUseError(VllmliteError):
    """An engine was called re-entrantly (from a signal handler or callback), or in a forked process."""


EXTRAS = {
    "torch": ("torch", "transformers"),
    "server": ("fastapi", "uvicorn", "prometheus_client", "httpx"),
    "guided": ("xgrammar",),
}
"""Modules by the extra of vllmlite that installs them."""


def not_installed(module: str) -> str:
    """Return a message that the Python ``module`` is not installed, and how to install it with Debian or pip."""
    distribution = module.replace("_", "-")
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    pip = f"vllmlite[{extra}]" if extra else distribution
    return f"the Python package {module} is not installed (Debian: python3-{distribution}; pip: {pip})"
