"""3D pictures of the lungs: VTK without a screen, or a projection in numpy where there is no OpenGL.

VTK's wheels (9.4 and later) find a way to draw by themselves: the window system, else EGL, else OSMesa. Where none
works the attempt can end the process, so it is made once in a child process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import vtk
from PIL import Image
from scipy import ndimage
from vtk.util import numpy_support

from LCTfoundLib.anatomy.structures import SEGMENTS, STRUCTURES, Side
from LCTfoundLib.export.slices import Picture, draw_text
from LCTfoundLib.export.surfaces import Mesh, point_normals

__all__ = ["Renderer", "View", "available_renderer", "render_views"]

_BACKGROUND = (255, 255, 255)
_TREE_COLORS = {"airway": (146, 197, 224), "pulmonary_artery": (30, 96, 190), "pulmonary_vein": (200, 52, 48)}
_PROBE = """
import vtk
w = vtk.vtkRenderWindow(); w.SetOffScreenRendering(1); w.SetSize(64, 64)
r = vtk.vtkRenderer(); r.SetBackground(0, 1, 0); w.AddRenderer(r); w.Render()
f = vtk.vtkWindowToImageFilter(); f.SetInput(w); f.Update()
raise SystemExit(0 if f.GetOutput().GetPointData().GetScalars().GetRange(1)[0] > 250 else 1)
"""


class Renderer(StrEnum):
    """Who draws."""

    VTK = "VTK"
    SOFTWARE = "software projection (no OpenGL here)"


@dataclass(frozen=True)
class View:
    """A viewpoint and what is seen from it.

    Attributes:
        title: caption.
        toward: LPS direction in which the camera looks.
        keys: structures drawn opaque.
        glass: structures drawn as faint glass around them.
        labels: write the segments' short names on them.
        size: width and height in pixels.
    """

    title: str
    toward: tuple[float, float, float]
    keys: tuple[str, ...]
    glass: tuple[str, ...] = ()
    labels: bool = False
    size: tuple[int, int] = (560, 486)


_SEGMENT_KEYS = tuple(s.key for s in SEGMENTS)
_TREE_KEYS = tuple(s.key for s in STRUCTURES[18:])
_RIGHT = tuple(s.key for s in SEGMENTS if s.side is Side.RIGHT)
_LEFT = tuple(s.key for s in SEGMENTS if s.side is Side.LEFT)

#: The views of the report.
STANDARD_VIEWS = (
    View("Trees in the lungs, from the front", (0, 1, 0), _TREE_KEYS, glass=_SEGMENT_KEYS, size=(900, 781)),
    View("Segments from the front", (0, 1, 0), _SEGMENT_KEYS, labels=True),
    View("Segments from behind", (0, -1, 0), _SEGMENT_KEYS, labels=True),
    View("Right lung, outer side", (1, 0, 0), _RIGHT, labels=True),
    View("Left lung, outer side", (-1, 0, 0), _LEFT, labels=True),
    View("Right lung, inner side", (-1, 0, 0), _RIGHT, labels=True),
    View("Left lung, inner side", (1, 0, 0), _LEFT, labels=True),
)


@lru_cache(maxsize=1)
def available_renderer() -> Renderer:
    """VTK if it can draw here, tried once in a child process; ``LCTFOUND_RENDERER=software`` forbids it."""
    if os.environ.get("LCTFOUND_RENDERER", "").lower() == "software" or not sys.executable:
        return Renderer.SOFTWARE
    try:
        with _quiet_window_choice():
            child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Renderer.SOFTWARE
    return Renderer.VTK if child.returncode == 0 else Renderer.SOFTWARE


@contextmanager
def _quiet_window_choice() -> Iterator[None]:
    """Name EGL outright on a Linux machine without a screen; VTK else tries X first and complains."""
    name = "VTK_DEFAULT_OPENGL_WINDOW"
    headless = sys.platform.startswith("linux") and not os.environ.get("DISPLAY") and name not in os.environ
    if headless:
        os.environ[name] = "vtkEGLRenderWindow"
    try:
        yield
    finally:
        if headless:
            os.environ.pop(name, None)


def render_views(
    meshes: Mapping[str, Mesh],
    views: tuple[View, ...] = STANDARD_VIEWS,
    renderer: Renderer | None = None,
    check: Callable[[], None] | None = None,
) -> list[Picture]:
    """Pictures of the views that have something to show.

    Args:
        meshes: by structure key, LPS mm.
        views: what to draw.
        renderer: who draws; what works here if None.
        check: called before each view; may raise to stop.
    """
    views = tuple(v for v in views if any(k in meshes and len(meshes[k].faces) for k in v.keys))
    if not views:
        return []
    drawn = (renderer or available_renderer()) is Renderer.VTK
    with _quiet_window_choice():
        stage = _VtkStage(meshes) if drawn else _SoftwareStage(meshes)
        pictures = []
        for view in views:
            if check is not None:
                check()
            pictures.append(_picture(stage, view))
        return pictures


def _picture(stage: _VtkStage | _SoftwareStage, view: View) -> Picture:
    color, codes = stage.draw(view)
    image = Image.fromarray(color)
    if view.labels:
        _write_names(image, codes)
    _write_sides(image, view)
    return Picture(image, view.title)


def _write_names(image: Image.Image, codes: np.ndarray) -> None:
    """Short name of each segment at the innermost pixel of what is seen of it."""
    for segment in SEGMENTS:
        seen = codes == segment.code
        if seen.sum() < 300:
            continue
        depth = ndimage.distance_transform_edt(np.pad(seen, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        if depth[y, x] >= 9:
            draw_text(image, (int(x), int(y)), segment.short, 20, "mm", (25, 25, 25), (255, 255, 255))


def _write_sides(image: Image.Image, view: View) -> None:
    """Letters of the patient's directions at the edges: the viewer's right is toward x superior."""
    right = np.cross(view.toward, (0, 0, 1))
    axis = int(np.abs(right).argmax())
    low, high = (("R", "L"), ("A", "P"), ("I", "S"))[axis]
    at_right, at_left = (high, low) if right[axis] > 0 else (low, high)
    width, height = image.size
    draw_text(image, (10, height // 2), at_left, 24, "lm", (90, 90, 90), _BACKGROUND)
    draw_text(image, (width - 10, height // 2), at_right, 24, "rm", (90, 90, 90), _BACKGROUND)


def _color_of(key: str) -> tuple[int, int, int]:
    return _TREE_COLORS.get(key) or next(s.color for s in STRUCTURES if s.key == key)


class _VtkStage:
    """One off-screen window with an actor per structure."""

    def __init__(self, meshes: Mapping[str, Mesh]) -> None:
        self._actors = {key: _actor(mesh, _color_of(key)) for key, mesh in meshes.items() if len(mesh.faces)}
        self._renderer = vtk.vtkRenderer()
        for actor in self._actors.values():
            self._renderer.AddActor(actor)
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        # Depth peeling needs alpha bits and no multisampling, or translucent structures vanish.
        self._window.SetMultiSamples(0)
        self._window.SetAlphaBitPlanes(1)
        self._window.AddRenderer(self._renderer)

    def draw(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Color (h, w, 3) uint8 and the structure code seen at each pixel (h, w)."""
        self._window.SetSize(*view.size)
        self._show(view)
        self._aim(view)
        codes = self._codes(view) if view.labels else np.zeros((1, 1), np.uint8)
        self._renderer.SetBackground(*(c / 255 for c in _BACKGROUND))
        # The codes must stay exact, the picture wants smooth edges.
        self._renderer.UseFXAAOn()
        self._renderer.SetUseDepthPeeling(bool(view.glass))
        self._renderer.SetMaximumNumberOfPeels(6)
        return self._grab(), codes

    def _show(self, view: View) -> None:
        for key, actor in self._actors.items():
            glass = key in view.glass
            actor.SetVisibility(glass or key in view.keys)
            surface = actor.GetProperty()
            surface.SetColor(*(c / 255 for c in _color_of(key)))
            surface.SetLighting(True)
            surface.SetOpacity(0.09 if glass else 1.0)
            surface.SetAmbient(0.18)
            surface.SetDiffuse(0.82)
            surface.SetSpecular(0.15)
            surface.SetSpecularPower(18)

    def _aim(self, view: View) -> None:
        bounds = np.array(self._renderer.ComputeVisiblePropBounds()).reshape(3, 2)
        middle, reach = bounds.mean(axis=1), float(np.ptp(bounds, axis=1).max())
        camera = self._renderer.GetActiveCamera()
        camera.ParallelProjectionOn()
        camera.SetFocalPoint(*middle)
        camera.SetPosition(*(middle - 3 * reach * np.asarray(view.toward, float)))
        camera.SetViewUp(0, 0, 1)
        width, height = view.size
        across = np.abs(np.cross(view.toward, (0, 0, 1))) @ np.ptp(bounds, axis=1)
        camera.SetParallelScale(0.53 * max(float(np.ptp(bounds[2])), across * height / width))
        self._renderer.ResetCameraClippingRange()

    def _codes(self, view: View) -> np.ndarray:
        """Flat pass in which the red channel is the structure's code."""
        for structure in STRUCTURES:
            if structure.key in self._actors and structure.key in view.keys:
                surface = self._actors[structure.key].GetProperty()
                surface.SetLighting(False)
                surface.SetColor(structure.code / 255, 0, 0)
        self._renderer.SetBackground(0, 0, 0)
        self._renderer.UseFXAAOff()
        self._renderer.SetUseDepthPeeling(False)
        codes = self._grab()[:, :, 0]
        self._show(view)
        return codes

    def _grab(self) -> np.ndarray:
        self._window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(self._window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        output = grabber.GetOutput()
        width, height, _ = output.GetDimensions()
        pixels = numpy_support.vtk_to_numpy(output.GetPointData().GetScalars()).reshape(height, width, -1)
        return np.ascontiguousarray(pixels[::-1, :, :3])


def _actor(mesh: Mesh, color: tuple[int, int, int]) -> vtk.vtkActor:
    data = vtk.vtkPolyData()
    points = vtk.vtkPoints()
    points.SetData(numpy_support.numpy_to_vtk(mesh.points.astype(np.float32), deep=True))
    data.SetPoints(points)
    cells = vtk.vtkCellArray()
    cells.SetData(3, numpy_support.numpy_to_vtkIdTypeArray(mesh.faces.ravel().astype(np.int64), deep=True))
    data.SetPolys(cells)
    normals = point_normals(mesh.points, mesh.faces).astype(np.float32)
    data.GetPointData().SetNormals(numpy_support.numpy_to_vtk(normals, deep=True))
    mapper = vtk.vtkPolyDataMapper()
    mapper.SetInputData(data)
    mapper.ScalarVisibilityOff()
    actor = vtk.vtkActor()
    actor.SetMapper(mapper)
    actor.GetProperty().SetColor(*(c / 255 for c in color))
    return actor


class _SoftwareStage:
    """The same pictures without OpenGL: points spread over the triangles, the nearest one wins its pixel."""

    def __init__(self, meshes: Mapping[str, Mesh]) -> None:
        self._meshes = {key: mesh for key, mesh in meshes.items() if len(mesh.faces)}
        self._codes = {s.key: s.code for s in STRUCTURES}

    def draw(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Color (h, w, 3) uint8 and the structure code seen at each pixel (h, w)."""
        frame = self._frame(view)
        color, codes = self._layer(view, [k for k in view.keys if k in self._meshes], frame)
        if view.glass:
            veil, behind = self._layer(view, [k for k in view.glass if k in self._meshes], frame)
            seen = behind > 0
            color[seen] = (0.78 * color[seen] + 0.22 * veil[seen]).astype(np.uint8)
        return color, codes

    def _frame(self, view: View) -> tuple[np.ndarray, np.ndarray, float]:
        """Camera axes (right, up, toward) as rows, middle of what is shown, pixels per mm."""
        toward = np.asarray(view.toward, float)
        axes = np.array([np.cross(toward, (0, 0, 1)), (0, 0, 1), toward])
        shown = [self._meshes[k].points for k in (*view.keys, *view.glass) if k in self._meshes]
        seen = np.concatenate(shown) @ axes.T
        low, high = seen.min(axis=0), seen.max(axis=0)
        reach = np.maximum(high - low, 1e-6)[:2] * 1.06
        return axes, (low + high) / 2, float((np.array(view.size) / reach).min())

    def _layer(
        self, view: View, keys: list[str], frame: tuple[np.ndarray, np.ndarray, float]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw some structures with a depth buffer."""
        width, height = view.size
        depth = np.full(width * height, np.inf)
        shade = np.zeros(width * height)
        codes = np.zeros(width * height, np.uint8)
        for key in keys:
            pixel, distance, light = self._splat(self._meshes[key], frame, view.size)
            # Farthest first: of equal indices the last assignment, the nearest point, stays.
            order = np.argsort(-distance)
            order = order[distance[order] < depth[pixel[order]]]
            depth[pixel[order]], shade[pixel[order]] = distance[order], light[order]
            codes[pixel[order]] = self._codes[key]
        color = np.full((width * height, 3), _BACKGROUND, np.float64)
        for key in keys:
            seen = codes == self._codes[key]
            color[seen] = np.outer(0.25 + 0.75 * shade[seen], _color_of(key))
        return color.reshape(height, width, 3).astype(np.uint8), codes.reshape(height, width)

    def _splat(
        self, mesh: Mesh, frame: tuple[np.ndarray, np.ndarray, float], size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixel index, distance and light of points spread evenly enough over the faces turned to the viewer."""
        axes, middle, scale = frame
        width, height = size
        corners = (mesh.points @ axes.T - middle)[mesh.faces] * scale
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        # Right, up and away from the viewer are a left-handed frame: there an outward normal comes out turned round.
        light = normal[:, 2] / np.maximum(np.linalg.norm(normal, axis=1), 1e-12)
        corners, light = corners[light > 0], light[light > 0]
        extent = np.ptp(corners[:, :, :2], axis=1).max(axis=1) * 1.5
        # Faces are worked on by size, so that the many small ones get few points: 2, 4, ... 128 steps along an edge.
        sizes = np.ceil(np.log2(np.clip(extent, 2, 128))).astype(int)
        parts = [_spread(corners[sizes == n], light[sizes == n], 2**n) for n in np.unique(sizes)]
        spread, shade = (np.concatenate(a) for a in zip(*parts, strict=True)) if parts else (np.empty((0, 3)), light)
        x = np.rint(spread[:, 0] + width / 2).astype(int)
        y = np.rint(height / 2 - spread[:, 1]).astype(int)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return (y * width + x)[inside], spread[inside, 2], shade[inside]


def _spread(corners: np.ndarray, values: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on a regular grid over each triangle (f, 3, 3), and each triangle's value at its points."""
    u, v = (a.ravel() for a in np.meshgrid(np.arange(steps + 1) / steps, np.arange(steps + 1) / steps))
    weights = np.column_stack([1 - u - v, u, v])[u + v <= 1 + 1e-9]
    points = np.einsum("wc,fcx->fwx", weights, corners).reshape(-1, 3)
    return points, np.repeat(values, len(weights))
