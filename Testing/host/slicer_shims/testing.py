"""`slicer.testing`: running the test class of a scripted module."""

from __future__ import annotations

import importlib
import sys
import unittest
from collections.abc import Sequence

import slicer

__all__ = ["EXIT_FAILURE", "EXIT_SUCCESS", "runUnitTest"]

EXIT_SUCCESS = 0
EXIT_FAILURE = 1


def runUnitTest(path: str | Sequence[str], testname: str) -> int:
    """Run every unittest class of the module `testname`, found in the folder or folders `path`.

    Slicer ends the application with the returned exit code; the host only returns it.
    """
    for folder in reversed([path] if isinstance(path, str) else list(path)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    module = importlib.import_module(testname)
    classes = [kind for kind in vars(module).values() if _isTestClass(kind) and kind.__module__ == testname]
    if not classes:
        raise RuntimeError(f"{testname} has no test class.")
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(kind) for kind in classes)
    outcome = unittest.TextTestRunner(verbosity=2, stream=sys.stderr).run(suite)
    slicer.app.processEvents()
    return EXIT_SUCCESS if outcome.wasSuccessful() else EXIT_FAILURE


def _isTestClass(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, unittest.TestCase)
