"""The state of an interrupted run: which layers are written, and the hidden states after them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllmlite import __version__
from vllmlite.errors import ParameterError
from vllmlite.weights.host import Floats
from vllmlite.weights.json_object import read_object

STATE = "progress.json"
TOKENS = "tokens.npy"


@dataclass(slots=True)
class Progress:
    """The directory in which a checkpoint is being written, and the number of layers that are finished."""

    work: Path
    digest: str
    """A hash of everything that the result depends on."""
    layers: int = 0
    rounded_to_nearest: list[str] = field(default_factory=list)
    """Weights of the finished layers that no calibration token reached."""

    @classmethod
    def open(cls, work: Path, source: Path, given: Sequence[Any]) -> Progress:
        """Create the directory ``work``, or read the progress of an earlier run with the same ``source`` and arguments.
        ParameterError if that run had other arguments."""
        files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.iterdir())
        digest = hashlib.sha256(repr((__version__, str(source.resolve()), files, given)).encode()).hexdigest()
        work.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        state = read_object(work / STATE, optional=True)
        if state and state.get("digest") != digest:
            raise ParameterError(
                "output",
                str(work),
                "was left by an interrupted run with other options: remove it, or repeat the options of that run",
            )
        progress = cls(work, digest, int(state.get("layers", 0)), list(state.get("rounded_to_nearest", [])))
        progress._save()
        return progress

    def tokens(self, make: Callable[[], NDArray[np.int32]]) -> NDArray[np.int32]:
        """Return the tokens of the calibration text, which ``make`` computes only in the first run."""
        path = self.work / TOKENS
        if not path.exists():
            _replace(path, make())
        found: NDArray[np.int32] = np.load(path)
        return found

    def hidden(self) -> Floats | None:
        """Return the hidden states after the last finished layer, or None if there are none."""
        if not self.layers:
            return None
        found: Floats = np.load(self._hidden(self.layers))
        return found

    def done(self, layers: int, hidden: Floats | None, rounded_to_nearest: Sequence[str]) -> None:
        """Record that this number of ``layers`` is written, with the ``hidden`` states after them."""
        if hidden is not None:
            _replace(self._hidden(layers), hidden)
        self.layers, self.rounded_to_nearest = layers, list(rounded_to_nearest)
        self._save()
        self._hidden(layers - 1).unlink(missing_ok=True)

    def finish(self, made: Path, target: Path) -> None:
        """Rename the finished checkpoint ``made``, the directory or a file in it, to ``target``."""
        if made != self.work:
            made.rename(target)
            self.discard()
            return
        for name in (STATE, TOKENS, self._hidden(self.layers).name):
            (self.work / name).unlink(missing_ok=True)
        self.work.chmod(0o755)
        self.work.rename(target)

    def discard(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.work)

    def _hidden(self, layers: int) -> Path:
        return self.work / f"hidden-{layers}.npy"

    def _save(self) -> None:
        state = {"digest": self.digest, "layers": self.layers, "rounded_to_nearest": self.rounded_to_nearest}
        temporary = self.work / f"{STATE}.new"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.work / STATE)


def _replace(path: Path, array: NDArray[Any]) -> None:
    """Replace the file ``path`` by ``array``, atomically."""
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
