"""`edgepress`, the one command of this project; `python -m tasks` is the same."""

from __future__ import annotations

import sys

from tasks.cli.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
