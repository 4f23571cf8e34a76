"""What tests of the panels share: one host for all of them, and an empty scene for each."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
_TESTING = Path(__file__).resolve().parents[1]
#: The host, and what the panels share (a panel finds it by itself; tests of the parts do not open one).
for _place in (_TESTING, _TESTING.parent / "LCTfound"):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

from host.none_guard import holdNone  # noqa: E402

holdNone()  # tests of the widgets use Qt without a host

#: Seconds a test may take; a marker `timeout(seconds)` on it says otherwise.
_LIMIT = 300


def _missing() -> list[str]:
    return [name for name in ("slicer_core", "PySide6") if importlib.util.find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): a test of the panels that may take longer than others")


class TooLong(Exception):
    """The test did not end in its time."""


@pytest.fixture(scope="session")
def host() -> Iterator[Any]:
    """The running host; tests that ask for it are skipped where its libraries are missing."""
    if missing := _missing():
        pytest.skip(f"{' and '.join(missing)} not installed: pip install -e '.[host]'")
    from host.application import Host

    running = Host()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _limited(request: pytest.FixtureRequest) -> Iterator[None]:
    """A scene can load for ever: no test does. What hangs in C++ ends the whole run, with a trace."""
    marker = request.node.get_closest_marker("timeout")
    seconds = marker.args[0] if marker else _LIMIT

    def stop(*_: Any) -> None:
        raise TooLong(f"longer than {seconds} s")

    faulthandler.dump_traceback_later(seconds + 30, exit=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def emptyScene(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing of the test before in the scene; and an exception in a slot or observer fails the test.

    Qt and VTK print such an exception and go on.
    """
    if "host" not in request.fixturenames:
        yield
        return
    host = request.getfixturevalue("host")
    host.scene.Clear(0)
    host.settle()
    caught: list[str] = []
    before, sys.excepthook = sys.excepthook, lambda *error: caught.append("".join(traceback.format_exception(*error)))
    try:
        yield
        host.settle()
    finally:
        sys.excepthook = before
    assert not caught, "exceptions in slots or observers:\n" + "\n".join(caught)
