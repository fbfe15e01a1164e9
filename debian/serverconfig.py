#!/usr/bin/python3
"""Write /etc/vllmlite/server.yaml: every option of `vllmlite serve` with its help, commented out at its default."""

import json
from collections import defaultdict
from dataclasses import Field, fields
from textwrap import wrap
from typing import Any

from vllmlite.cli.serve import SERVER_OPTIONS
from vllmlite.config.engine_config import EngineConfig
from vllmlite.server.config import ServerConfig

HEAD = """\
# Options of vllmlite.service, in YAML. A line "#option: value" shows an option's default; "#option:" has none. To
# change an option, remove the leading # and edit the value, then run
#
#   systemctl restart vllmlite
#
# The options are the same as the flags of vllmlite-serve(1). A copy of this file, /etc/vllmlite/NAME.yaml, configures
# vllmlite@NAME.service. See also /usr/share/doc/vllmlite-server/README.Debian, for example about API keys.
"""


def help_of(field: Field[Any]) -> str:
    """Return an option's help, with its accepted values."""
    values = field.metadata.get("choices")
    text: str = field.metadata["help"]
    return f"{text} ({', '.join(values)})" if values else text


def main() -> None:
    """Print the file."""
    groups: dict[str, list[Field[Any]]] = defaultdict(list)
    own = [field for field in fields(EngineConfig) if field.name not in SERVER_OPTIONS]
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
