#!/usr/bin/env python3
"""Rebuild the demo model in vllmlite/data/demo from Debian packages.

    train_demo_model.py fetch DIR                   download the packages (any sid mirror; no root) to DIR/root
    train_demo_model.py corpus --root DIR/root      clean and tokenise their text (a minute): .cache/demo
    train_demo_model.py train                       train (a GPU: 3 minutes; two CPU cores: 8 days): .cache/demo/run
    train_demo_model.py release --root DIR/root     write vllmlite/data/demo, with the manifest
    train_demo_model.py drafts                      train an EAGLE-3 head and a draft model on the model's own answers
                                                    (half an hour of one CPU core each): .cache/demo/eagle3,
                                                    which is vllmlite/data/drafts/eagle3, and .cache/demo/draft
    train_demo_model.py copyright                   print the model's paragraph of debian/copyright
    train_demo_model.py verify --root DIR/root      check corpus and first training steps against the manifest

Needs python3-torch, python3-tokenizers and python3-safetensors. The corpus depends on the package versions, which the
manifest names; `fetch --mirror` with a snapshot mirror gets those versions.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from demo_model import corpus, drafts, fetch, release
from demo_model.model import Shape
from demo_model.training import Recipe, train

HERE = Path(__file__).resolve().parent.parent
CACHE, DATA = HERE / ".cache" / "demo", HERE / "vllmlite" / "data" / "demo"


def main() -> None:
    """Parse the command line and run its command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download the corpus's packages")
    fetching.add_argument("directory", type=Path)
    fetching.add_argument("--mirror", help="Debian mirror (default: the one apt uses)")
    fetching.add_argument("--suite", default="sid")
    for name, purpose in (
        ("corpus", "build the corpus"),
        ("release", "write the package's files"),
        ("verify", "check the manifest"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument(
            "--root", type=Path, default=Path("/"), help="tree with the packages in it (default: /)"
        )
    training = commands.add_parser("train", help="train the model")
    training.add_argument("--steps", type=int, default=Recipe().steps)
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    training.add_argument("--compile", action="store_true", help="compile the model first (faster on a GPU)")
    training.add_argument("--out", type=Path, default=CACHE / "run")
    drafting = commands.add_parser("drafts", help="train an EAGLE-3 head and a draft model")
    drafting.add_argument("--answers", type=int, default=drafts.DraftRecipe().answers)
    drafting.add_argument("--steps", type=int, default=drafts.DraftRecipe().steps)
    drafting.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop each training after this time"
    )
    drafting.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    drafting.add_argument("--out", type=Path, default=CACHE)
    commands.add_parser("copyright", help="print the model's paragraph of debian/copyright")
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        fetch.fetch(
            arguments.directory.resolve(), arguments.mirror or fetch.configured_mirror(), arguments.suite
        )
    elif arguments.command == "corpus":
        print(json.dumps(release.tokenise(corpus.build(arguments.root), Shape().vocab_size, CACHE), indent=1))
    elif arguments.command == "train":
        run(arguments.steps, arguments.device, arguments.compile, arguments.out)
    elif arguments.command == "release":
        write(arguments.root)
    elif arguments.command == "drafts":
        train_drafts(arguments)
    elif arguments.command == "copyright":
        print(release.copyright_stanza(json.loads((DATA / "manifest.json").read_text())))
    else:
        verify(arguments.root)


def run(steps: int, device: str, compiled: bool, out: Path) -> None:
    """Train on the cached corpus; save weights and log."""
    torch.set_float32_matmul_precision("high")
    recipe = replace(Recipe(), steps=steps)
    model, log = train(recipe, Shape(), *release.load_tokens(CACHE), torch.device(device), compiled=compiled)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    release.save_run(model, recipe, log, name, out)


def train_drafts(arguments: argparse.Namespace) -> None:
    """Train what drafts for the built-in model, on its own answers; write checkpoints."""
    recipe = drafts.DraftRecipe(answers=arguments.answers, steps=arguments.steps)
    texts = drafts.answers(recipe)
    model = release.load_weights(Shape(), DATA / "model.safetensors").to(arguments.device)
    data = drafts.Conversations(model, texts, recipe, arguments.out / "states")
    seconds = 60 * arguments.minutes
    drafts.train_head(model, data, recipe, arguments.out / "eagle3", seconds)
    drafts.train_small(model, data, recipe, arguments.out / "draft", DATA / "tokenizer.json", seconds)


def write(root: Path) -> None:
    """Replay the first training steps on this CPU and write the package's files."""
    recipe = release.recipe_of(CACHE / "run")
    losses = release.replay(recipe, Shape(), CACHE)
    release.write_package(
        DATA, CACHE, CACHE / "run", recipe, Shape(), (root / "snapshot").read_text().strip(), losses
    )


def verify(root: Path) -> None:
    """Rebuild the corpus and repeat the first training steps; both must agree with the manifest."""
    manifest = json.loads((DATA / "manifest.json").read_text())
    facts = release.tokenise(corpus.build(root), Shape().vocab_size, CACHE)
    recorded = {source["package"]: source for source in manifest["sources"]}
    built = {
        source["package"]: source for source in json.loads((CACHE / "corpus.json").read_text())["sources"]
    }
    for package in sorted(recorded.keys() | built.keys()):
        ours, theirs = built.get(package), recorded.get(package)
        if ours != theirs:
            print(
                f"{package}: {ours and ours['version']} here, {theirs and theirs['version']} in the manifest"
            )
    if facts["sha256"] != manifest["corpus"]["sha256"]:
        raise SystemExit("the corpus differs from the manifest's")
    losses = release.replay(Recipe(**manifest["recipe"]), Shape(**manifest["shape"]), CACHE)
    furthest = max(
        abs(ours - theirs) for ours, theirs in zip(losses, manifest["replay"]["losses"], strict=True)
    )
    if furthest > manifest["replay"]["tolerance"]:
        raise SystemExit(f"the first losses are {losses}, the manifest's {manifest['replay']['losses']}")
    print(f"corpus and first {len(losses)} losses agree with the manifest (within {furthest:.5f})")


if __name__ == "__main__":
    main()
