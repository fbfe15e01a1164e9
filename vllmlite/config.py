"""EngineConfig: everything an engine can be told. Flags, ``--config`` YAML and ``--help`` derive from its fields."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from vllmlite.config_absent import ABSENT
from vllmlite.errors import ParameterError
from vllmlite.sampling_params import MAX_LOGPROBS

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
CPU_ISAS = ("auto", "baseline", "avx2", "avx512", "avx512_bf16", "neon")
DTYPE_SYNONYMS = {"float": "float32", "half": "float16"}


def _option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its ``help``.

    ``metadata``: ``group``; ``choices`` and ``synonyms`` of a string; ``low`` and ``high`` of a number; ``size`` for
    whole numbers that take a suffix; ``metavar``."""
    return field(default=default, metadata={"help": help, "group": "engine", **metadata})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine runs and with what means, under vLLM's names. Raises :class:`ParameterError` on bad values."""

    model: str | None = _option(
        None,
        "directory with a checkpoint, or Hugging Face id; default: the built-in demo model",
        group="model",
        metavar="DIR|ID",
    )
    tokenizer: str | None = _option(
        None,
        "directory or Hugging Face id of the tokenizer; default: the model's",
        group="model",
        metavar="DIR|ID",
    )
    skip_tokenizer_init: bool = _option(
        False, "load no tokenizer: token ids in, token ids out", group="model"
    )
    revision: str | None = _option(
        None, "branch, tag or commit of a model on the hub", group="model", metavar="REVISION"
    )
    tokenizer_revision: str | None = _option(
        None, "branch, tag or commit of a tokenizer on the hub", group="model", metavar="REVISION"
    )
    download_dir: str | None = _option(
        None, "where downloads are cached; default: the Hugging Face cache", group="model", metavar="DIR"
    )
    load_format: str = _option(
        "auto",
        "dummy: random weights, to measure speed",
        group="model",
        choices=("auto", "safetensors", "dummy"),
    )
    dtype: str = _option(
        "auto",
        "dtype of weights and activations; auto: the backend's best for the checkpoint's",
        group="model",
        choices=("auto", *FLOAT_DTYPES),
        synonyms=DTYPE_SYNONYMS,
    )
    max_model_len: int | None = _option(
        None,
        "longest sequence, prompt and output together; default: the model's context",
        group="model",
        low=1,
        size=True,
    )
    generation_config: str = _option(
        "auto",
        "default sampling parameters: auto, the model's generation_config.json; vllm, the engine's own; or a directory",
        group="model",
        metavar="auto|vllm|DIR",
    )
    served_model_name: str | None = _option(
        None, "name to show for the model; default: as it was given", group="model", metavar="NAME"
    )

    backend: str = _option("auto", "what computes", choices=("auto", "cpu", "cuda", "torch"))
    device: str = _option("auto", "where: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    threads: int | None = _option(
        None, "CPU threads; default: the cores this process may use", low=1, high=4096
    )
    cpu_isa: str = _option(
        "auto",
        "newest instruction set that the cpu backend uses; auto: the CPU's best",
        choices=CPU_ISAS,
    )
    kv_cache_dtype: str = _option(
        "auto",
        "dtype of the key/value cache; auto: the model's",
        choices=("auto", *FLOAT_DTYPES),
        synonyms=DTYPE_SYNONYMS,
    )
    block_size: int = _option(16, "tokens in a key/value cache block", low=1, high=1024)
    num_gpu_blocks_override: int | None = _option(None, "key/value cache blocks, on any device", low=1)
    kv_cache_memory_bytes: int | None = _option(
        None,
        "memory for the key/value cache: bytes, or 512M, 4G, 2GiB (1024-based; MB, GB: 1000-based)",
        low=1,
        size=True,
    )
    gpu_memory_utilization: float = _option(
        0.9,
        "part of the device's memory to use, where the cache's size is not given (CPU: of what is free, to 4 GiB)",
    )
    max_num_batched_tokens: int = _option(
        2048, "most tokens in a step, prompts and decodes together", low=1, size=True
    )
    max_num_seqs: int = _option(256, "most sequences in a step", low=1, high=65536)
    enable_prefix_caching: bool = _option(True, "reuse cached blocks of equal prompt beginnings")
    scheduling_policy: str = _option(
        "fcfs", "who goes first: first come, or the lowest priority number", choices=("fcfs", "priority")
    )
    async_scheduling: bool | None = _option(
        None, "keep two steps in flight; default: where the backend is asynchronous"
    )
    enforce_eager: bool = _option(False, "record no graphs")
    seed: int = _option(0, "sampling is reproducible from this", low=0, high=2**64 - 1)
    max_logprobs: int = _option(
        MAX_LOGPROBS, "most log-probabilities a request may ask for; -1: no limit", low=-1
    )

    def __post_init__(self) -> None:
        """Normalise paths, sizes and dtype synonyms; check every field, then the fields against one another."""
        for f in fields(self):
            value = _normalise(f, getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            _check(f, value)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ParameterError(
                "gpu_memory_utilization", self.gpu_memory_utilization, "must be over 0 and at most 1"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ParameterError("device", self.device, "must be auto, cpu, cuda or cuda:N")
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ParameterError(
                "num_gpu_blocks_override",
                self.num_gpu_blocks_override,
                "says the size of the key/value cache, and so does kv_cache_memory_bytes: give one of them",
            )
        for name in ("tokenizer", "tokenizer_revision"):
            if self.skip_tokenizer_init and getattr(self, name) is not None:
                raise ParameterError(
                    name, getattr(self, name), "is not used with skip_tokenizer_init: leave one out"
                )
        if self.model is None and self.revision is not None:
            raise ParameterError(
                "revision", self.revision, "the built-in model has no revisions: name a model"
            )

    @classmethod
    def from_kwargs(cls, **options: Any) -> EngineConfig:
        """A configuration from keyword arguments, vLLM's included; what is not here is refused by its name."""
        return cls(**known_options(options))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> EngineConfig:
        """A configuration from a YAML mapping of options; ``overrides`` win over the file."""
        return cls.from_kwargs(**{**read_yaml(path), **overrides})

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> EngineConfig:
        """What a parser of :func:`add_engine_arguments` found: flags over ``--config`` over defaults."""
        given = {f.name: getattr(namespace, f.name) for f in fields(cls) if hasattr(namespace, f.name)}
        path = getattr(namespace, "config", None)
        return cls(**given) if path is None else cls.from_yaml(path, **given)


class EngineArgs(EngineConfig):
    """vLLM's name for :class:`EngineConfig`, taking every keyword that :meth:`EngineConfig.from_kwargs` takes."""

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """See :class:`EngineConfig`'s fields."""
        super().__init__(model=model, **known_options(options))

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """vLLM's name for :func:`add_engine_arguments`; returns ``parser``."""
        add_engine_arguments(parser)
        return parser

    from_cli_args = EngineConfig.from_namespace


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``options`` that are fields; raises where one is unknown, or asks for something that is absent."""
    names = {f.name for f in fields(EngineConfig)}
    known: dict[str, Any] = {}
    for name, value in options.items():
        if name in names:
            known[name] = value
        elif name not in ABSENT:
            raise ParameterError(name, value, "no such option" + did_you_mean(name, [*names, *ABSENT]))
        elif not ABSENT[name].accepts(value):
            raise ParameterError(name, value, ABSENT[name].reason)
    return known


def did_you_mean(name: str, candidates: Collection[str]) -> str:
    """``; did you mean …?`` with the candidate closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse_size(text: str) -> int:
    """A whole number with an optional suffix: K, M, G, T and KiB … in 1024s; k, m, g, t and KB … in 1000s."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 1048576, 512M, 4G or 2GiB")
    number, unit, rest = match.group(1), match.group(2) or "", (match.group(3) or "").lower()
    base = 1024 if rest == "ib" or (unit.isupper() and not rest) else 1000
    size = float(number) * base ** ("kmgt".index(unit.lower()) + 1 if unit else 0)
    if not unit:
        size = int(number) if number.isdigit() else size
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number")
    return int(size)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file, its keys' dashes turned to underscores."""
    try:
        import yaml
    except ImportError:
        raise ParameterError(
            "config", str(path), "reading YAML needs PyYAML (Debian: python3-yaml)"
        ) from None
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as e:
        raise ParameterError("config", str(path), f"cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ParameterError("config", str(path), f"is not YAML: {' '.join(str(e).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ParameterError("config", str(path), "must hold one mapping from option names to values")
    options: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in options:
            raise ParameterError("config", str(path), f"says {name} twice")
        options[name] = value
    return options


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for each field, ``--config``, and hidden ones for what is in :data:`ABSENT`.

    Flags that are not given leave nothing in the namespace: :meth:`EngineConfig.from_namespace` merges."""
    groups = {name: parser.add_argument_group(f"{name} options") for name in ("model", "engine")}
    for f in fields(EngineConfig):
        names = ["-m", "--model"] if f.name == "model" else [_flag(f.name)]
        groups[f.metadata["group"]].add_argument(
            *names, dest=f.name, default=argparse.SUPPRESS, **_argument(f)
        )
    groups["engine"].add_argument(
        "--config", metavar="FILE", help="YAML file of these options; flags win over it"
    )
    for name, absent in ABSENT.items():
        action = _AbsentFlag if any(isinstance(n, bool) for n in absent.neutral) else _AbsentValue
        parser.add_argument(
            _flag(name), dest=name, action=action, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _argument(f: Field[Any]) -> dict[str, Any]:
    meta = f.metadata
    text = meta["help"].replace("%", "%%")
    if f.default is not None and "default" not in text and not isinstance(f.default, bool):
        text += f" (default: {f.default})"
    if "bool" in f.type:
        on = f" (default: {'on' if f.default else 'off'})" if f.default is not None else ""
        return {"action": argparse.BooleanOptionalAction, "help": text + on}
    argument: dict[str, Any] = {"help": text, "metavar": meta.get("metavar")}
    if "choices" in meta:
        argument["choices"] = (*meta["choices"], *meta.get("synonyms", ()))
        argument["metavar"] = "{" + ",".join(meta["choices"]) + "}"
    elif meta.get("size"):
        argument.update(type=_size_argument, metavar="SIZE" if "memory" in f.name else "N")
    elif "int" in f.type:
        argument.update(type=int, metavar="N")
    elif "float" in f.type:
        argument.update(type=float, metavar="X")
    return argument


def _size_argument(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


class _AbsentValue(argparse.Action):
    """``--flag VALUE`` of an option in :data:`ABSENT`: an error, unless the value asks for nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        try:
            import json

            value = json.loads(values)
        except ValueError:
            value = values
        absent = ABSENT[self.dest]
        if not (absent.accepts(value) or absent.accepts(values)):
            parser.error(f"{flag}={values}: {absent.reason}")


class _AbsentFlag(argparse.BooleanOptionalAction):
    """``--flag`` or ``--no-flag`` of an option in :data:`ABSENT`: an error, unless that asks for nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        flag: str | None = None,
    ) -> None:
        absent = ABSENT[self.dest]
        if flag is not None and not absent.accepts(not flag.startswith("--no-")):
            parser.error(f"{flag}: {absent.reason}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _normalise(f: Field[Any], value: Any) -> Any:
    if "str" in f.type:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if "synonyms" in f.metadata and value is not None:
            text = str(value).removeprefix("torch.")
            return f.metadata["synonyms"].get(text, text)
    if f.metadata.get("size") and isinstance(value, str):
        try:
            return parse_size(value)
        except ValueError as e:
            raise ParameterError(f.name, value, str(e)) from None
    if f.type == "float" and type(value) is int:
        return float(value)
    return value


_TYPES = {
    "str": (str, "a string"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (bool, "True or False"),
}


def _check(f: Field[Any], value: Any) -> None:
    type_name, _, optional = str(f.type).partition(" | ")
    if value is None and optional:
        return
    expected, words = _TYPES[type_name]
    if type(value) is not expected:
        raise ParameterError(f.name, value, f"must be {words}" + (" or None" if optional else ""))
    choices = f.metadata.get("choices")
    if choices is not None and value not in choices:
        close = did_you_mean(str(value), choices)
        raise ParameterError(f.name, value, f"must be {', '.join(choices[:-1])} or {choices[-1]}{close}")
    if value == "":
        raise ParameterError(f.name, value, "must not be empty")
    low, high = f.metadata.get("low"), f.metadata.get("high")
    if low is not None and not low <= value:
        raise ParameterError(f.name, value, f"must be at least {low}")
    if high is not None and not value <= high:
        raise ParameterError(f.name, value, f"must be at most {high}")
