"""Answers the dialogs that a test brings up: the real dialog opens, and is used as a user would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from host.qt_compat import QtCore, QtWidgets

__all__ = ["answering"]


def _text_of(dialog: Any) -> str:
    if isinstance(dialog, QtWidgets.QMessageBox):
        return dialog.text
    return dialog.labelText() if isinstance(dialog, QtWidgets.QInputDialog) else dialog.windowTitle


@contextmanager
def answering(answer: Callable[[Any], None]) -> Iterator[list[Any]]:
    """While it lasts, each dialog that waits for an answer is given to `answer` once, which must end it.

    Yields the list of the dialogs' texts (of dialogs that are not Qt's own: their titles). A dialog that `answer` left
    open is rejected, so that no test waits for ever.
    """
    seen: list[Any] = []
    texts: list[str] = []

    def look() -> None:
        dialog = QtWidgets.QApplication.activeModalWidget()
        if dialog is None:
            return
        if any(known is dialog for known in seen):
            dialog.reject()
            return
        seen.append(dialog)
        texts.append(_text_of(dialog))
        answer(dialog)

    timer = QtCore.QTimer()
    timer.setInterval(10)
    timer.timeout.connect(look)
    timer.start()
    try:
        yield texts
    finally:
        timer.stop()
