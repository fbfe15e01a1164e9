"""``vllmlite env``: versions, hardware and backends for a bug report; works with any subset of packages."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vllmlite import __version__
from vllmlite.cli import machine, probe
from vllmlite.errors import VllmliteError
from vllmlite.hub import BUILT_IN, find_model

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser

PACKAGES = (
    "torch", "tokenizers", "transformers", "huggingface-hub", "safetensors", "numpy", "jinja2", "pyyaml", "tqdm"
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="do not probe the backends, which imports torch")
    parser.add_argument("--model", metavar="DIR|ID", help="also report how this model would run")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Print the report."""
    facts = gather(ask_backends=not args.quick, model=args.model)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def gather(ask_backends: bool = True, model: str | None = None) -> dict[str, Any]:
    """Return all facts as a JSON-serialisable dict, with those of ``model`` if it is given."""
    answers = probe.probe() if ask_backends else []
    return {
        "vllmlite": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: _version(name) for name in PACKAGES},
        "system": machine.system(),
        "cpu": machine.cpu(),
        "memory": machine.memory(),
        "nvidia": machine.nvidia(),
        "backends": answers,
        "built_in_model": _built_in_model(),
        "model": _model(model, answers) if model is not None else None,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def as_text(facts: dict[str, Any]) -> str:
    """Return ``facts`` as text for people."""
    packages = facts["packages"]
    cpu, memory, nvidia, model = (facts[name] for name in ("cpu", "memory", "nvidia", "built_in_model"))
    limit = f", limited to {cpu['core_limit']:g}" if cpu["core_limit"] is not None else ""
    rows = {
        "vllmlite": facts["vllmlite"],
        "python": f"{facts['python']['version']} ({facts['python']['executable']})",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version) or "none",
        "not installed": ", ".join(name for name, version in packages.items() if not version) or "nothing",
        "system": "{os}, Linux {kernel}, {machine}".format(**facts["system"]),
        "cpu": f"{cpu['model'] or 'unknown'}; {cpu['usable_cores']} of {cpu['cores']} cores usable{limit}",
        "cpu features": " ".join(cpu["isa"]) or "unknown",
        "memory": f"{_gib(memory['total'])}, {_gib(memory['available'])} available"
        + (f", limited to {_gib(memory['limit'])}" if memory["limit"] is not None else ""),
        "nvidia": f"driver {nvidia['driver']}, {len(nvidia['gpus'])} GPUs: {', '.join(nvidia['gpus']) or 'none'}"
        if nvidia["driver"]
        else "no driver",
    }
    for answer in facts["backends"]:
        verdict = "available" if answer["available"] else "declines"
        name = f"{answer['backend']} on {answer['kind']}" if answer["kind"] else "backends"
        rows[name] = ": ".join(filter(None, (verdict, answer["reason"])))
    rows["built-in model"] = ", ".join(f"{k} {v}" for k, v in model.items()) if model else "not installed"
    if facts["model"] is not None:
        rows["model"] = _model_text(facts["model"])
    for name, value in facts["environment"].items():
        rows[name] = value
    return "\n".join(f"{name:<15} {value}" for name, value in rows.items())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except Exception:  # not installed, or with unreadable metadata
        return None


def _built_in_model() -> dict[str, Any]:
    """Return architecture, weight bytes and manifest of the built-in model; empty if it is not installed."""
    config = _json_object("config.json")
    if not config:
        return {}
    return {
        "architecture": ", ".join(map(str, config.get("architectures") or ())) or config.get("model_type"),
        "weight_bytes": sum(file.stat().st_size for file in BUILT_IN.glob("*.safetensors")),
        **{k: v for k, v in _json_object("manifest.json").items() if isinstance(v, (str, int, float))},
    }


def _model(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how model ``name`` would run on the backends in ``answers``, or why it cannot."""
    from vllmlite.models.plan import declining, plan_model

    try:
        path = find_model(name, weights=False)
        plan = plan_model(path)
    except VllmliteError as error:
        return {"name": name, "error": str(error)}
    # A model with transformers' code is only known to run after a trial with its weights.
    untried = plan.implementation == "transformers" and not (answers and any(path.glob("*.safetensors")))
    if plan.implementation == "transformers" and not untried and (reason := probe.probe_model(path)):
        return {"name": name, "error": reason}
    declined = declining(plan)
    quantization = None if plan.spec is None else plan.spec.quantization
    forms = probe.probe_weights(path) if answers and plan.quantization and path.is_dir() else {}
    able = [answer for answer in answers if answer["available"] and answer["backend"] not in declined]
    return {
        "name": name,
        "architecture": plan.architecture,
        "implementation": plan.implementation,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "weights": forms,
        "kv_cache_dtype": quantization.kv_cache_dtype if quantization is not None else None,
        "max_model_len": plan.max_position_embeddings,
        "runs_on": [f"{answer['backend']} on {answer['kind']}" for answer in able],
        "declines": declined,
        "untried": untried,
    }


def _model_text(model: dict[str, Any]) -> str:
    if "error" in model:
        return f"does not run: {model['error']}"
    weights = model["quantization"] or model["dtype"]
    facts = [
        f"{model['name']}: {model['architecture']} in {weights}, {model['implementation']}, "
        f"{model['max_model_len']} tokens"
    ]
    if model["kv_cache_dtype"] is not None:
        facts.append(f"key/value cache in {model['kv_cache_dtype']}")
    if model["untried"]:
        facts.append("transformers' code has not been tried with its weights")
    elif model["runs_on"]:
        facts.append(f"runs on {', '.join(model['runs_on'])}")
    facts += [f"{backend}: {form}" for backend, form in model["weights"].items()]
    return "; ".join(facts + list(model["declines"].values()))


def _json_object(name: str) -> dict[str, Any]:
    try:
        content = json.loads((BUILT_IN / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
