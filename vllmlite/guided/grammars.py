"""Guided output: grammars from JSON schemas, regular expressions, choices and EBNF, through xgrammar.

:mod:`vllmlite.guided.compiler` compiles each grammar once, and a :class:`Grammars` caches it. A :class:`Matcher`
follows one sequence through its grammar and gives the mask of allowed next tokens. xgrammar (Dong et al. 2024) is
imported when the first grammar arrives, in the engine's process and in the compiler process: importing it may import
torch, which takes seconds.
"""

from __future__ import annotations

import json
import logging
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from copy import copy
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from vllmlite.engine.request import allows
from vllmlite.errors import ParameterError, not_installed
from vllmlite.guided.compiler import GrammarCompiler, Prepared, Vocabulary, compile_prepared, compiler_for
from vllmlite.guided.json_keywords import LITERAL, NAMED, SchemaError
from vllmlite.guided.json_pattern import MAX_COUNT
from vllmlite.guided.json_schema import exact
from vllmlite.sampling_params import StructuredOutputsParams, ThinkingMarks
from vllmlite.tokenizers.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_CHARACTERS = 64 << 10
MAX_DEPTH = 32
"""Limits of schemas and expressions; anything longer or deeper is refused before compilation."""
MAX_KEPT = 256
"""Number of compiled grammars in the cache."""


class CompiledGrammar:
    """A grammar compiled for one model."""

    def __init__(self, key: str, packed: bytes) -> None:
        """Wrap ``packed``, the compressed :class:`Prepared` form of a grammar; ``key`` identifies it in the cache."""
        self.key = key
        self.packed = packed
        self.native: Any = None
        """xgrammar's compiled grammar; None until :meth:`load` is called in this process."""

    @classmethod
    def of(cls, key: str, prepared: Prepared) -> CompiledGrammar:
        """Return the grammar for ``key``, packed so that it can be sent to another process."""
        return cls(key, zlib.compress(json.dumps([prepared.kind, prepared.text]).encode(), 1))

    def load(self, compiler: Any) -> None:
        """Compile it in this process with an ``xgrammar.GrammarCompiler``, which releases the GIL meanwhile."""
        kind, text = json.loads(zlib.decompress(self.packed))
        self.native = compile_prepared(compiler, Prepared(kind, text))


class Matcher:
    """The position of one sequence in its grammar, or in the reasoning before it."""

    def __init__(
        self, compiled: CompiledGrammar, num_words: int, marks: ThinkingMarks | None, *, needs_end_id: bool
    ) -> None:
        """Follow a sequence; called by :meth:`Grammars.start`. If ``compiled`` is not loaded, another process follows
        the sequence."""
        self._marks = marks
        self._mask: bytes | None = None
        self.compiled = compiled
        if compiled.native is not None:
            import xgrammar

            self._row = np.empty((1, num_words), np.int32)
            self._matcher = xgrammar.GrammarMatcher(
                compiled.native, terminate_without_stop_token=not needs_end_id
            )
            self.restart()

    def restart(self) -> None:
        """Return to the state before the first token."""
        self._thinks = self._marks is not None and self._marks.opening_id is None
        self._may_think = self._marks is not None and not self._thinks
        self._matcher.reset()
        self._num_matched = 0
        """Number of ids that the native matcher has accepted."""
        self._fill()

    def masks(self, drafts: Sequence[int] = ()) -> list[bytes | None]:
        """Return the bitmasks of the ids that may come next, and of those after each of ``drafts`` while these are
        allowed; None allows all ids. The position does not change."""
        masks = [self._next_mask]
        if drafts:
            before = (self._thinks, self._may_think, self._mask, self._num_matched)
            for token_id in drafts:
                if not allows(masks[-1], token_id) or self.accept(token_id):
                    break
                masks.append(self._next_mask)
            num_matched = before[-1]
            if self._num_matched > num_matched:
                self._matcher.rollback(self._num_matched - num_matched)
            self._thinks, self._may_think, self._mask, self._num_matched = before
        return masks

    def accept(self, token_id: int) -> bool:
        """Advance by one token; return whether the output must end, because the grammar is complete or allows
        nothing."""
        if self._marks is not None and (self._thinks or self._may_think):
            begins = self._may_think and token_id == self._marks.opening_id
            ends = self._thinks and token_id == self._marks.closing_id
            free, self._may_think = self._thinks or begins, False
            self._thinks = free and not ends
            if free:
                return ends and not self._fill()
        if not self._matcher.accept_token(token_id):
            return True
        self._num_matched += 1
        return bool(self._matcher.is_terminated()) or not self._fill()

    def fork(self) -> Matcher:
        """Return a copy of the matcher at the same position, for another sequence."""
        other = copy(self)
        other._row, other._matcher = self._row.copy(), self._matcher.fork()
        return other

    @property
    def _next_mask(self) -> bytes | None:
        return None if self._thinks else self._mask

    def _fill(self) -> bool:
        """Compute the next mask; return whether it allows any token."""
        self._mask = None
        if not self._matcher.fill_next_token_bitmask(self._row):
            return True
        if self._may_think and self._marks is not None and self._marks.opening_id is not None:
            word, bit = divmod(self._marks.opening_id, 32)
            self._row.view(np.uint32)[0, word] |= np.uint32(1 << bit)
        self._mask = self._row.astype("<i4", copy=False).tobytes()
        return self._mask != bytes(len(self._mask))


class Grammars:
    """The cache of compiled grammars of one model."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int], *, loads: bool = True
    ) -> None:
        """Start with an empty cache. ``loads``: also compile the grammars for use in this process; otherwise xgrammar
        is never imported here."""
        self._loads = loads
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._info: Any = None
        """The vocabulary as an ``xgrammar.TokenizerInfo``."""
        self._process: GrammarCompiler | None = None
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()
        """Guards ``_kept`` and ``_making``. It is never held during a compilation."""
        self._making: dict[str, Future[CompiledGrammar]] = {}
        self._setup = threading.RLock()
        """Guards ``_info``, ``_process`` and the vocabulary, which are made for the first grammar."""

    def compile(self, params: StructuredOutputsParams) -> CompiledGrammar:
        """Return the compiled grammar of ``params``. Thread-safe. Raises :class:`ParameterError` if it has none."""
        kind, source = params.kind_and_source()
        _check(kind, source)
        key = json.dumps([kind, source])
        return self._find_or_make(
            key, lambda: CompiledGrammar.of(key, self._compiler(kind).compile(kind, _form(kind, source)))
        )

    def load(self, params: StructuredOutputsParams, packed: bytes) -> None:
        """Add a grammar that another process compiled from ``params`` to the cache."""
        key = json.dumps(params.kind_and_source())
        self._find_or_make(key, lambda: CompiledGrammar(key, packed))

    def start(self, compiled: CompiledGrammar, after: ThinkingMarks | None = None) -> Matcher:
        """Return a matcher at the beginning of a grammar, or before reasoning marked by the ids in ``after``.

        Raises :class:`ParameterError` if an id in ``after`` is outside the vocabulary."""
        if after is not None:
            self._check_id("closing_id", after.closing_id)
            if after.opening_id is not None:
                self._check_id("opening_id", after.opening_id)
        return Matcher(compiled, -(-self._vocab_size // 32), after, needs_end_id=bool(self._eos_ids))

    def _check_id(self, field: str, token_id: object) -> None:
        if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
            raise ParameterError(
                f"structured_outputs.after.{field}",
                token_id,
                f"must be an id from 0 to {self._vocab_size - 1}",
            )

    def _find_or_make(self, key: str, make: Callable[[], CompiledGrammar]) -> CompiledGrammar:
        """Return the grammar ``key``. Threads that want the same one wait for the first of them; others do not."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            making = self._making.get(key)
            mine = self._making.setdefault(key, Future())
        if making is not None:
            return making.result()
        try:
            found = make()
            if self._loads:
                found.load(compiler_for(self._tokenizer_info()))
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(found)
            with self._lock:
                self._kept[key] = found
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            return found
        finally:
            with self._lock:
                del self._making[key]

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        texts, byte_level = self._tokenizer.vocabulary(self._vocab_size)
        kind = "BYTE_LEVEL" if byte_level else "BYTE_FALLBACK" if "<0x0A>" in texts else "RAW"
        return Vocabulary(texts, kind, self._vocab_size, self._eos_ids)

    def _tokenizer_info(self) -> Any:
        with self._setup:
            if self._info is None:
                self._info = self._vocabulary.tokenizer_info()
            return self._info

    def _compiler(self, kind: str) -> GrammarCompiler:
        if find_spec("xgrammar") is None:
            raise ParameterError("structured_outputs", kind, f"needs xgrammar: {not_installed('xgrammar')}")
        with self._setup:
            if self._process is None:
                self._process = GrammarCompiler(self._vocabulary)
            return self._process


def _check(kind: str, source: Any) -> None:
    """Raise ParameterError if ``source`` is too large or too deep to compile."""

    def refuse(value: object, reason: str) -> None:
        raise ParameterError(f"structured_outputs.{kind}", value, reason)

    size = len(source) if isinstance(source, str) else len(json.dumps(source))
    if size > MAX_CHARACTERS:
        refuse(f"{size} characters", f"must be at most {MAX_CHARACTERS}")
    if kind == "regex":
        for count in _quantifiers(source):
            if count > MAX_COUNT:
                refuse(count, f"repetitions must be at most {MAX_COUNT}")
    if kind in ("json", "structural_tag") and (depth := _depth(source)) > MAX_DEPTH:
        refuse(f"{depth} levels", f"must be at most {MAX_DEPTH} levels deep")


def _form(kind: str, source: Any) -> Any:
    """Return ``source`` rewritten so that all of it is enforced. Raises :class:`ParameterError` if it cannot be."""
    try:
        if kind == "json":
            return exact(source)
        if kind == "structural_tag":
            return _with_exact_schemas(_in_new_form(source))
    except SchemaError as error:
        raise ParameterError(f"structured_outputs.{kind}", source, str(error)) from None
    return source


def _in_new_form(tag: dict[str, Any]) -> dict[str, Any]:
    """Return a structural tag in xgrammar's current form; vLLM calls the form with ``structures`` deprecated."""
    if "structures" not in tag:
        return {"type": "structural_tag", **tag}
    try:
        tags = [
            {
                "begin": structure["begin"],
                "content": {"type": "json_schema", "json_schema": structure["schema"]},
                "end": structure["end"],
            }
            for structure in tag["structures"]
        ]
    except (TypeError, KeyError):
        reason = "must have structures with begin, schema and end"
        raise ParameterError("structured_outputs.structural_tag", tag, reason) from None
    form = {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}
    return {"type": "structural_tag", "format": form}


def _with_exact_schemas(tag: Any) -> Any:
    """Return a part of a structural tag with its JSON Schemas rewritten by :func:`exact`."""
    if isinstance(tag, list):
        return [_with_exact_schemas(entry) for entry in tag]
    if not isinstance(tag, dict):
        return tag
    return {
        name: exact(value) if name == "json_schema" else _with_exact_schemas(value)
        for name, value in tag.items()
    }


def _depth(schema: Any) -> int:
    """Return the nesting depth of ``schema``; maps of property names and literal values do not count as levels."""
    depth, level = 0, [schema]
    while level:
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, list):
                below += entry
            for keyword, value in entry.items() if isinstance(entry, dict) else ():
                if keyword in NAMED and isinstance(value, dict):
                    below += value.values()
                elif keyword not in LITERAL:
                    below.append(value)
        level = [entry for entry in below if isinstance(entry, (list, dict))]
        depth += bool(level)
    return depth


def _quantifiers(regex: str) -> Iterator[int]:
    """Yield the numbers in the ``{m,n}`` quantifiers of a regular expression."""
    for piece in regex.split("{")[1:]:
        for number in piece.partition("}")[0].split(","):
            if number.strip().isdigit():
                yield int(number) if len(number) < 10 else MAX_COUNT + 1
