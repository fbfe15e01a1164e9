#!/usr/bin/python3
"""Write /etc/vllmlite/server.yaml: every option of `vllmlite serve` with its help, commented out at its default."""

import json
from collections import defaultdict
from dataclasses import Field, fields
from textwrap import wrap
from typing import Any

from vllmlite.cli.serve import OWN
from vllmlite.config.engine_config import EngineConfig
from vllmlite.server.config import ServerConfig

HEAD = """\
# Options of vllmlite.service, in YAML. "#option: value" shows an option that is at its default, or that has none: take
# the mark away to change it, then run
#
#   systemctl restart vllmlite
#
# The flags of vllmlite-serve(1) are the same options. A copy of this file, /etc/vllmlite/NAME.yaml, is what
# vllmlite@NAME.service reads. /usr/share/doc/vllmlite-server/README.Debian tells more, also of API keys.
"""


def help_of(field: Field[Any]) -> str:
    """What --help says of an option, with the values it takes."""
    values = field.metadata.get("choices")
    text: str = field.metadata["help"]
    return f"{text} ({', '.join(values)})" if values else text


def main() -> None:
    """Print the file."""
    groups: dict[str, list[Field[Any]]] = defaultdict(list)
    own = [field for field in fields(EngineConfig) if field.name not in OWN]
    for field in (*own, *fields(ServerConfig)):
        groups[field.metadata["group"]].append(field)
    print(HEAD)
    for group in sorted(groups, key="engine".__eq__):
        print(f"# ---- {group}\n")
        for field in groups[group]:
            print(*(f"# {line}" for line in wrap(help_of(field), 116)), sep="\n")
            value = "" if field.default is None else " " + json.dumps(field.default)
            print(f"#{field.name.replace('_', '-')}:{value}\n")


if __name__ == "__main__":
    main()
