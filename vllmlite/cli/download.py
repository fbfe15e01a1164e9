"""``vllmlite download``: fetch a model from the hub to the cache, or to a tarball."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from vllmlite.cli.parser import OptionParser


def add_arguments(parser: OptionParser) -> None:
    """Add the options to ``parser``."""
    parser.add_argument("repo", metavar="REPO", help="id of a model on the hub: owner/name")
    parser.add_argument(
        "--revision", metavar="REVISION", help="branch, tag or commit; default: the main branch"
    )
    parser.add_argument(
        "--download-dir", metavar="DIR", help="cache directory; default: the Hugging Face cache"
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files to download, such as '*Q8_0.gguf'; may be repeated; default: configuration, tokenizer, and weights "
        "(safetensors if there are any)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="files not to download; may be repeated",
    )
    parser.add_argument(
        "--tarball",
        metavar="FILE",
        help="also write the model to FILE (.tar, .tar.gz or .tar.zst), which --model accepts on another machine",
    )


def run(args: argparse.Namespace, parser: OptionParser) -> int:
    """Download the model, verify it, and print its directory."""
    from vllmlite.hub import is_hub_id
    from vllmlite.hub.download import NotReached, download
    from vllmlite.hub.snapshot import (
        TARBALLS,
        cache_root,
        cached_snapshot,
        is_tarball,
        is_undisturbed,
        model_in,
        repository_in,
    )
    from vllmlite.hub.tarball import write_tarball

    if not is_hub_id(args.repo):
        parser.error(f"{args.repo}: not the id of a model on the hub (owner/name)")
    target = None if args.tarball is None else Path(args.tarball).expanduser()
    if target is not None and not is_tarball(target):
        parser.error(f"--tarball {target}: must end in one of {', '.join(TARBALLS)}")
    if target is not None and target.exists():
        parser.error(f"--tarball {target}: exists already")
    root = cache_root(args.download_dir)
    try:
        snapshot = download(
            args.repo,
            revision=args.revision,
            root=root,
            include=args.include,
            exclude=args.exclude,
            again=True,
        )
    except NotReached as error:
        cached = cached_snapshot(repository_in(root, args.repo), args.revision)
        if cached is None or not is_undisturbed(cached) or model_in(cached) is None:
            raise
        print(f"vllmlite: {error}; using the copy in the cache:", file=sys.stderr)
        snapshot = cached
    print(snapshot)
    if target is not None:
        write_tarball(snapshot, target, args.revision)
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    return 0
