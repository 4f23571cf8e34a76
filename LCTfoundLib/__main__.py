"""``python -m LCTfoundLib``: the shell door."""

from __future__ import annotations

import sys

from LCTfoundLib.cli import main

if __name__ == "__main__":
    sys.exit(main())
