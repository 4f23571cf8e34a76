"""How the lung panel feels: the numbers of a run in the window, measured on the host.

    ./run python Testing/benchmarks/panel.py [--runs 100] [--size 512 512 300]

Prints a line a number, with its target. The patient is synthetic, scanned on a 512 x 512 x 300 grid.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "Testing")]

from LCTfoundLib.volume import Volume  # noqa: E402

MODULE = REPOSITORY / "LCTfound" / "LCTfoundLungSegmentation" / "LCTfoundLungSegmentation.py"


def tell(what: str, value: float, unit: str, target: str) -> None:
    print(f"{what:<58}{value:10.3f} {unit:<6} target {target}", flush=True)


def patient(size: tuple[int, int, int]) -> Volume:
    """A synthetic chest on a grid of ``size`` (i, j, k) voxels."""
    from training.phantom.render import phantom

    ct = phantom(seed=20, spacing=2.5).ct
    extent = np.array(ct.shape[::-1]) * ct.spacing
    spacing = extent / size
    origin = np.array(ct.origin) - np.array(ct.spacing) / 2 + spacing / 2
    grid = Volume(np.broadcast_to(np.int16(0), size[::-1]), tuple(spacing), tuple(origin))
    return ct.resample(grid, pad=-1024)


def small_patient() -> Volume:
    """96 x 96 x 96 voxels of 1.5 mm around the right lung of a synthetic patient."""
    from training.phantom.render import phantom

    case = phantom(seed=20, spacing=1.5)
    middle = np.argwhere(np.isin(case.segments.array, range(1, 11))).mean(axis=0).astype(int)
    return case.ct.crop(middle - 48, middle + 48)


def add_volume(ct: Volume, name: str):
    import slicer
    import vtk

    node = slicer.util.addVolumeFromArray(ct.array, name=name)
    matrix = vtk.vtkMatrix4x4()
    matrix.DeepCopy((np.diag([-1, -1, 1, 1]) @ ct.affine).ravel().tolist())
    node.SetIJKToRASMatrix(matrix)
    return node


def live(until: Callable[[], bool], timeout: float = 600) -> list[float]:
    """Let the window live; seconds between the turns of its event loop."""
    import slicer

    gaps, last = [], time.monotonic()
    end = last + timeout
    while not until():
        slicer.app.processEvents()
        now = time.monotonic()
        gaps.append(now - last)
        last = now
        if now > end:
            raise TimeoutError
        time.sleep(0.001)
    return gaps


def measure_run(panel, volume) -> None:
    """From Apply to the shown result, with a warm worker."""
    import slicer

    from LCTfoundSlicer.run import RunState, sharedRunner

    runner = sharedRunner()
    runner.warmUp()
    live(lambda: (runner.poll(), runner.isWarm)[1])
    slicer.app.layoutManager().setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutFourUpView)
    panel._parameterNode.inputVolume = volume
    panel._parameterNode.quality = "fast"
    live(lambda: True)
    start = time.monotonic()
    panel.ui.applyButton.click()
    run = panel._run
    tell("Apply returns to the window", time.monotonic() - start, "s", "<= 0.1")
    sending = live(lambda: run.state is not RunState.SENDING)
    first = live(lambda: panel.ui.progressBar.value > 31 or run.state.isOver)
    tell("Apply -> first progress of the worker (CT sent: 150 MB)", time.monotonic() - start, "s", "<= 1")
    working = live(lambda: run.state is not RunState.WORKING)
    tell("longest block while the worker computes", max(sending + first + working), "s", "<= 0.1")
    ready = time.monotonic()
    showing = live(lambda: panel._run is None)
    tell("result -> in the scene and the panel", time.monotonic() - ready, "s", "<= 2")
    showing += settle()
    tell("result -> drawn in slice views and in 3D", time.monotonic() - ready, "s", "<= 2 and 5")
    tell("longest block while the result is shown", max(showing), "s", "<= 0.3")


def settle() -> list[float]:
    """Until all views are drawn."""
    import slicer

    views = slicer.app.layoutManager()._views()
    return live(lambda: not any(view._isStale and view.isVisible() for view in views))


def measure_cancel(panel, volume) -> None:
    seconds = []
    for share in (40, 150, 300, 500, 700):
        panel._parameterNode.outputSegmentation = None
        panel.ui.applyButton.click()
        live(lambda share=share: panel.ui.progressBar.value > share)
        start = time.monotonic()
        panel.ui.applyButton.click()
        live(lambda: panel._run is None)
        seconds.append(time.monotonic() - start)
    tell("Cancel, slowest of 5 at different stages", max(seconds), "s", "<= 1")


def measure_leaks(panel, runs: int) -> None:
    """Many runs on a small phantom: memory, nodes, processes and files must not grow."""
    import psutil
    import slicer

    volume = add_volume(small_patient(), "Small")
    me = psutil.Process()
    result = panel.logic.process(volume, quality="fast", device="cpu")
    values = []
    start = time.monotonic()
    for number in range(runs):
        panel.logic.process(volume, result, quality="fast", device="cpu")
        worker = me.children(recursive=True)
        memory = (me.memory_info().rss + sum(child.memory_info().rss for child in worker)) / 2**20
        values.append((memory, slicer.mrmlScene.GetNumberOfNodes(), len(worker), me.num_fds()))
        if (number + 1) % 10 == 0:
            print(f"  run {number + 1}: {memory:.0f} MB, nodes {values[-1][1]}, processes {values[-1][2]}", flush=True)
    early, late = np.array(values[4:10]).mean(axis=0), np.array(values[-6:]).mean(axis=0)
    print(f"{runs} runs of {(time.monotonic() - start) / runs:.1f} s each")
    for what, a, b in zip(("memory, MB", "nodes", "processes", "open files"), early, late, strict=True):
        print(f"{what + ': runs 5-10 -> last 6':<58}{a:10.1f} -> {b:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--size", type=int, nargs=3, default=(512, 512, 300))
    arguments = parser.parse_args()
    from host.application import Host

    host = Host()
    import slicer

    host.open_window()
    start = time.monotonic()
    host.load_module(MODULE)
    panel = slicer.modules.lctfoundlungsegmentation.widgetRepresentation().self()
    panel.enter()
    live(lambda: True)
    tell("panel opens", time.monotonic() - start, "s", "<= 1")
    volume = add_volume(patient(tuple(arguments.size)), "Patient")
    measure_run(panel, volume)
    measure_cancel(panel, volume)
    slicer.mrmlScene.Clear(0)
    panel.enter()
    measure_leaks(panel, arguments.runs)


if __name__ == "__main__":
    main()
