"""Entry point of ``python3 -m vllmlite``."""

import sys

from vllmlite.cli import main

if __name__ == "__main__":
    sys.exit(main())
