"""Lets ``python -m fedkd`` stand for ``fedkd``, where the package is not installed."""

from __future__ import annotations

import sys

from fedkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
