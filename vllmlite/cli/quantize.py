"""``vllmlite quantize``: write a copy of a checkpoint with 8-bit or 4-bit weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllmlite.config.engine_config import QUANTIZATIONS

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser


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
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        required=True,
        help="weight format: 8-bit or 4-bit integers, in groups of 32",
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="output directory; must not exist"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all usable cores")


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Quantise the checkpoint and print its size before and after."""
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads={args.threads}: must be at least 1")
    from vllmlite.hub import find_model
    from vllmlite.quantize import quantize_checkpoint

    begin = time.monotonic()
    source = find_model(args.model, revision=args.revision, download_dir=args.download_dir)
    target = Path(args.output).expanduser()
    quantize_checkpoint(source, target, args.quantization, args.threads)
    before, after = (
        sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (source, target)
    )
    print(
        f"{target}: {after / 1e6:.1f} MB of weights in {args.quantization}, {before / 1e6:.1f} MB before; "
        f"{time.monotonic() - begin:.1f} s"
    )
    return 0
