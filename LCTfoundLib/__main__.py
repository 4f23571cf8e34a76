"""``python -m LCTfoundLib``: the two doors, the shell and the worker."""

from __future__ import annotations

import sys


def main() -> int:
    """Open the door that was asked for; the worker's without the imports of the shell's, which cost half a second."""
    if sys.argv[1:] == ["worker"]:
        from LCTfoundLib.worker import main as worker

        return worker()
    from LCTfoundLib.cli import main as shell

    return shell()


if __name__ == "__main__":
    sys.exit(main())
