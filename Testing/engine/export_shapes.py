"""A small pair of lungs with 18 segments and three branching trees, for the tests of the exports."""

from __future__ import annotations

import numpy as np

from LCTfoundLib.export.bundle import LungExport
from LCTfoundLib.volume import Volume

#: Segment codes of each lobe, from the top of the lung down.
_LOBES = (((1, 2, 3), (4, 5), (6, 7, 8, 9, 10)), ((11, 12, 13, 14), (15, 16, 17, 18)))


def lung_volumes(
    shape: tuple[int, int, int] = (44, 56, 80),
    spacing: tuple[float, float, float] = (3.0, 3.0, 4.0),
    origin: tuple[float, float, float] = (-118.0, -80.0, -40.0),
    direction: np.ndarray | None = None,
) -> tuple[Volume, Volume, Volume]:
    """CT, segments and trees of ellipsoid lungs cut in 18 pieces, in index space: ``direction`` turns it all."""
    k, j, i = np.indices(shape, dtype=np.float32)
    depth, height, width = shape
    z, y = (k - depth / 2) / (0.46 * depth), (j - height / 2) / (0.44 * height)
    segments = np.zeros(shape, np.uint8)
    for side, lobes in enumerate(_LOBES):
        x = (i - width * (0.26 + 0.48 * side)) / (0.2 * width)
        inside = x**2 + y**2 + z**2 < 1
        angle = (np.arctan2(y, x) / (2 * np.pi)) % 1
        level = np.digitize(z, np.linspace(-0.7, 0.7, len(lobes) + 1)[1:-1])
        for number, codes in enumerate(reversed(lobes)):
            here = inside & (level == number)
            segments[here] = np.array(codes, np.uint8)[np.minimum(angle[here] * len(codes), len(codes) - 1).astype(int)]
    trees = np.zeros(shape, np.uint8)
    for code, shift in ((3, 5), (2, 2), (1, 0)):
        _draw_tree(trees, code, shift)
    hu = np.where(segments > 0, -840, 30).astype(np.int16)
    hu[trees > 1], hu[trees == 1] = 60, -980
    grid = Volume(hu, spacing, origin, np.eye(3) if direction is None else direction, {"Modality": "CT"})
    return grid, grid.with_array(segments), grid.with_array(trees)


def _draw_tree(trees: np.ndarray, code: int, shift: int) -> None:
    """A trunk from the top border that forks into thin, oblique branches, down to one voxel."""
    depth, height, width = trees.shape
    root, fork = (
        np.array([depth - 1, height / 2 + shift, width / 2]),
        np.array([0.6 * depth, height / 2 + shift, width / 2]),
    )
    _draw_tube(trees, code, root, fork, 2.6)
    for side in (-1, 1):
        hilum = fork + (-0.12 * depth, 0, side * 0.2 * width)
        _draw_tube(trees, code, fork, hilum, 1.6)
        for up, back in ((1, -1), (1, 1), (-1, -1), (-1, 1)):
            tip = hilum + (up * 0.2 * depth, back * 0.22 * height, side * 0.07 * width)
            _draw_tube(trees, code, hilum, tip, 0.6)


def _draw_tube(trees: np.ndarray, code: int, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    for share in np.linspace(0, 1, 80):
        center = start + share * (end - start)
        low = np.maximum(np.floor(center - radius).astype(int), 0)
        high = np.minimum(np.ceil(center + radius).astype(int) + 1, trees.shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        away = sum(
            (np.arange(a, b) - c).reshape([-1 if n == axis else 1 for n in range(3)]) ** 2
            for axis, (a, b, c) in enumerate(zip(low, high, center, strict=True))
        )
        trees[box][away <= max(radius, 0.5) ** 2] = code
        trees[tuple(np.clip(np.rint(center).astype(int), 0, np.array(trees.shape) - 1))] = code


def lung_export(**changes: object) -> LungExport:
    """The lungs above as a complete export."""
    ct, segments, trees = lung_volumes()
    parts: dict[str, object] = {"case": "Test case", "segments": segments, "trees": trees, "ct": ct} | changes
    return LungExport(**parts)  # type: ignore[arg-type]


def oblique(degrees: tuple[float, float, float], flips: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    """Direction matrix of rotations about x, y and z after flips of the axes."""
    result = np.diag(np.array(flips, float))
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        result = turn @ result
    return result
