#!/usr/bin/env python3
"""Compare texts of the built-in model in each GGUF type with those of llama.cpp's llama-completion.

PYTHONPATH=. scripts/compare_llama_cpp.py [--root DIR] [--types TYPE...] [--max-tokens N]

tests/support/gguf_files.py (BF16) and llama-quantize make the files. llama-quantize and llama-completion are those of
Debian's llama.cpp-tools; with --root they run chrooted to that directory (needs root). The exit status is 1 if a text
differs for a type whose weights both compute as floats; for other types rounding differs, and the first difference is
shown."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests/support"))

from gguf_files import contents, encode, tokenizer_metadata

from vllmlite import LLM, SamplingParams
from vllmlite.hub import BUILT_IN

TYPES = ("BF16", "F16", "F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M", "Q6_K")
PROMPTS = ("Debian is", "The package manager", "The kernel", "A shell script")


def main() -> int:
    """Compare the texts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, metavar="TYPE")
    parser.add_argument("--max-tokens", type=int, default=48, metavar="N")
    args = parser.parse_args()
    chroot = ["chroot", str(args.root)] if args.root != Path("/") else []
    differing = 0
    with tempfile.TemporaryDirectory(dir=args.root / "tmp") as scratch:
        inside = Path("/tmp") / Path(scratch).name if chroot else Path(scratch)
        metadata, tensors = contents(BUILT_IN, lambda name: "BF16")
        metadata |= tokenizer_metadata(BUILT_IN, "gpt-2")
        Path(scratch, "BF16.gguf").write_bytes(encode(metadata, tensors))
        for kind in args.types:
            if kind != "BF16":
                argv = ["llama-quantize", inside / "BF16.gguf", inside / f"{kind}.gguf", kind]
                subprocess.run([*chroot, *argv], check=True, capture_output=True)
            llm = LLM(str(Path(scratch, f"{kind}.gguf")), backend="cpu", max_model_len=512)
            params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
            same = 0
            for output in llm.generate(list(PROMPTS), params, use_tqdm=False):
                ours = output.outputs[0].text
                argv = [
                    "llama-completion",
                    "-m",
                    inside / f"{kind}.gguf",
                    "-p",
                    output.prompt,
                    "-t",
                    "2",
                    "-no-cnv",
                ]
                argv += ["-n", str(args.max_tokens), "--temp", "0", "--no-warmup", "--no-display-prompt"]
                run = subprocess.run(
                    [*map(str, chroot + argv)],
                    check=True,
                    capture_output=True,
                    text=True,
                    stdin=subprocess.DEVNULL,
                )
                theirs = run.stdout.split(" [end of text]")[0].removesuffix("\n\n")
                same += ours == theirs
                if ours != theirs:
                    pairs = enumerate(zip(ours, theirs, strict=False))
                    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                    print(
                        f"  {output.prompt!r} differs from character {at}: {ours[at:][:40]!r}, {theirs[at:][:40]!r}"
                    )
            treatment = llm.llm_engine.backend_choice.partition("GGUF matrices: ")[2]
            print(f"{kind}: {same} of {len(PROMPTS)} texts the same ({treatment})", flush=True)
            differing += "kept" not in treatment and same < len(PROMPTS)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
