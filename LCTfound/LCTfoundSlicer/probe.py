"""Run by the worker's Python, alone and with nothing but the standard library: which packages really import there.

``python -P probe.py <JSON>`` with ``{"packages": [import names], "engine": folder of LCTfoundLib}`` writes one JSON
object a line. "importing" comes before each import: when an import kills the process, the last line names it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from typing import Any


def main() -> None:
    request = json.loads(sys.argv[1])
    say = _channel()
    say({"gpus": parseGpus(_driversWords())})
    for name in request["packages"]:
        say({"importing": name})
        say({"package": name, **_imported(name)})
    if getattr(sys.modules.get("torch"), "__file__", None):
        say({"bridge": _numpyBridgeProblem()})
        say({"torch": _torchFacts()})
    sys.path.append(request["engine"])
    say({"importing": "LCTfoundLib"})
    say({"hardware": _hardware()})
    say({"done": True})


def _channel() -> Any:
    """Where the lines go: the real stdout, which the packages' own prints no longer reach."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    return say


def _driversWords() -> str:
    """What NVIDIA's driver says of its GPUs; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, creationflags=flags)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def parseGpus(text: str) -> list[list[Any]]:
    """[name, driver, memory in MiB] of nvidia-smi's lines; what is no such line is passed over."""
    lines = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    return [[*parts[:2], int(parts[2])] for parts in lines if len(parts) == 3 and parts[2].isdecimal()]


def _imported(name: str) -> dict[str, Any]:
    try:
        module = importlib.import_module(name)
    except BaseException as error:  # a broken package may raise anything, even SystemExit
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    if getattr(module, "__file__", None) is None:
        return {"error": "only remains of it are there (a folder without __init__.py)"}
    return {"version": str(getattr(module, "__version__", "")), "file": module.__file__}


def _numpyBridgeProblem() -> str:
    """Whether torch and numpy hand arrays to each other; a torch built for numpy 1 imports, but cannot do that."""
    try:
        import numpy
        import torch

        back = (torch.from_numpy(numpy.arange(3.0)) + 1).numpy()
        return "" if back.tolist() == [1.0, 2.0, 3.0] else f"wrong values came back: {back.tolist()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def _torchFacts() -> dict[str, Any]:
    try:
        import torch

        usable = torch.cuda.is_available()
        return {
            "version": torch.__version__,
            "cuda": torch.version.cuda or "",
            "cudaUsable": usable,
            "architectures": torch.cuda.get_arch_list() if usable else [],
            "capability": list(torch.cuda.get_device_capability()) if usable else [],
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _hardware() -> list[list[str]]:
    """The engine's own (what, value) lines about this machine; empty where it cannot be imported yet."""
    try:
        from LCTfoundLib.runtime.device import describe

        return [list(line) for line in describe()]
    except Exception:
        return []


if __name__ == "__main__":
    main()
