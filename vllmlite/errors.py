"""The errors vllmlite raises on purpose. Each message says what was wrong, with what value, and what would do."""

from __future__ import annotations


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

    def __reduce__(self) -> tuple[type[ParameterError], tuple[str, object, str]]:
        """For pickle: errors cross from the engine's process to its user's."""
        return type(self), (self.field, self.value, self.accepted)


class ModelError(VllmliteError):
    """A model cannot be found, read or run: bad checkpoint, unknown architecture, unusable configuration."""


class BackendError(VllmliteError):
    """No compute backend can do what was asked: a missing device, an operation or dtype it lacks, no memory."""


class EngineDeadError(VllmliteError):
    """The engine has been shut down, or has failed for good: it takes no more requests."""
