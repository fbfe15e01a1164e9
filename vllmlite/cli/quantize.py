"""``vllmlite quantize``: write a copy of a checkpoint with weights of fewer bits, for this and other programs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllmlite.config.engine_config import QUANTIZATIONS

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser

FORMATS = ("int8", "int4", "gptq", "awq", "compressed-tensors", "fp8", "gguf-q8_0", "gguf-q4_0")
METHODS = ("rtn", "gptq", "awq")


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="DIR|ID",
        help="checkpoint directory or Hugging Face id; default: the built-in demo model",
    )
    parser.add_argument("--revision", metavar="REVISION", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--download-dir", metavar="DIR", help="cache directory of downloads")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument(
        "--format",
        choices=FORMATS,
        help="int8 and int4 are vllmlite's own, in groups of 32; llama.cpp reads gguf-q8_0 and gguf-q4_0; vLLM and "
        "transformers the others",
    )
    form.add_argument("--quantization", choices=QUANTIZATIONS, help="the same as --format int8 or int4")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="rtn",
        help="how gptq, awq, compressed-tensors and gguf-q4_0 are rounded: to nearest (the default), by GPTQ, or GPTQ "
        "after AWQ's scaling",
    )
    parser.add_argument("--bits", type=int, metavar="N", help="bits of a weight: 4 (the default) or 8")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="weights of a row that share a scale; -1: the whole row; default: 128",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="give each group a zero of its own (gptq, compressed-tensors)",
    )
    parser.add_argument(
        "--act-order", action="store_true", help="with --method gptq: round columns with large inputs first"
    )
    parser.add_argument(
        "--quantize-head",
        action="store_true",
        help="quantise the output layer too (gptq, compressed-tensors)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text for --method gptq and awq, or .jsonl with the key text; default: what the built-in model writes",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help="tokens of it to use; default: 32768"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR|FILE", required=True, help="new directory, or for GGUF, new file"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all usable cores")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Quantise the checkpoint and print its size before and after."""
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads={args.threads}: must be at least 1")
    from vllmlite.hub import find_model
    from vllmlite.quantize import quantize_checkpoint
    from vllmlite.terminal import note

    begin = time.monotonic()
    source = find_model(args.model, revision=args.revision, download_dir=args.download_dir)
    target = Path(args.output).expanduser()
    optional: dict[str, Any] = {}
    if args.calibration_tokens is not None:
        optional["num_tokens"] = args.calibration_tokens
    with _Bar() as bar:
        report = quantize_checkpoint(
            source,
            target,
            args.format or args.quantization,
            method=args.method,
            bits=args.bits,
            group_size=args.group_size,
            symmetric=False if args.asymmetric else None,
            act_order=args.act_order,
            quantize_head=args.quantize_head,
            calibration=None if args.calibration is None else Path(args.calibration).expanduser(),
            threads=args.threads,
            show=bar,
            **optional,
        )
    if report.resumed_at:
        note(f"an interrupted run was continued after layer {report.resumed_at - 1}")
    if report.rounded_to_nearest:
        count = len(report.rounded_to_nearest)
        note(f"no calibration token reached {count} weights, which were rounded to nearest:")
        note("\n".join(report.rounded_to_nearest))
    form = args.format or args.quantization
    before, after = (_size(place) for place in (source, target))
    print(
        f"{target}: {after / 1e6:.1f} MB in {form}, {before / 1e6:.1f} MB before; "
        f"{time.monotonic() - begin:.1f} s"
    )
    return 0


def _size(path: Path) -> int:
    """Return the bytes of a checkpoint's weights: a file, or the files of a directory that hold tensors."""
    if path.is_file():
        return path.stat().st_size
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return sum(file.stat().st_size for pattern in patterns for file in path.glob(pattern))


class _Bar:
    """A bar of layers on standard error if that is a terminal and tqdm is installed."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            try:
                from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=done, desc="Layers", disable=None)
        self._bar.update(done - self._bar.n)
