"""`python -m host panel [CT]`: the panels of this repository in a window, without Slicer.

The folder Testing has to be on the path; `./run panel` sees to it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_MODULES = _ROOT / "LCTfound"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if getattr(options, "screenshot", True) is not None or not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    try:
        from host.application import Host
    except ImportError as problem:
        print(f"The host cannot start: {problem}. Install what it needs: pip install -e '.[host]'", file=sys.stderr)
        return 2
    if options.command == "screenshots":
        from host.screenshots import take

        return take(Host(), options.folder)
    return _run(Host(testing=options.screenshot is not None), options)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    panel = commands.add_parser("panel", help="open the panels")
    help_text = "CT: a file, or a folder of DICOM files; or a saved scene. Default: the demo's CT"
    panel.add_argument("data", nargs="?", type=Path, help=help_text)
    panel.add_argument("--module", default="LCTfoundLungSegmentation", help="module to begin with")
    panel.add_argument("--screenshot", type=Path, help="save a picture of the window as PNG and end")
    panel.add_argument("--panel-screenshot", type=Path, help="save a picture of the panel alone as PNG and end")
    pictures = commands.add_parser("screenshots", help="pictures of each panel with a real result, for the documents")
    pictures.add_argument("folder", nargs="?", type=Path, default=_ROOT / "Resources" / "Screenshots")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.exists():
        parser.error(f"{options.data} does not exist")
    if options.module not in [path.stem for path in moduleFiles()]:
        parser.error(f"no module {options.module}; there are {', '.join(path.stem for path in moduleFiles())}")
    return options


def moduleFiles() -> list[Path]:
    """The module files of this repository: `LCTfound/X/X.py`."""
    return sorted(path for path in _MODULES.glob("*/*.py") if path.stem == path.parent.name)


def _run(host: Any, options: argparse.Namespace) -> int:
    for path in moduleFiles():
        host.load_module(path)
    host.open_window()
    _load(host, options.data or demo_ct())
    host.select_module(options.module)
    if options.panel_screenshot is not None:
        host.grab_panel(options.panel_screenshot)
    if options.screenshot is not None:
        host.grab(options.screenshot)
    if options.screenshot is None and options.panel_screenshot is None:
        host.run()
    host.close()
    return 0


def demo_ct() -> Path:
    """The demo's CT of a real patient; fetched once."""
    from LCTfoundLib import demo

    return demo.fetch_case(demo.cache_folder()).ct


def _load(host: Any, data: Path) -> None:
    import slicer

    if data.is_dir():
        volume = max(host.load_dicom_folder(data), key=lambda node: node.GetImageData().GetNumberOfPoints())
    elif data.suffix.lower() in (".mrb", ".mrml"):
        slicer.util.loadScene(str(data))
        volume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
    else:
        volume = slicer.util.loadVolume(str(data))
    if volume is not None:
        slicer.util.setSliceViewerLayers(background=volume, fit=True)
    host.layoutManager.resetThreeDViews()


if __name__ == "__main__":
    raise SystemExit(main())
