"""Frozen features for the linear probes: the same code for every backbone, and for the gray values alone.

A probe sees of a slice either one vector (mean and standard deviation over space of each map, at each timestep, in
each window) or a vector for each place of a lattice (the decoder's maps, interpolated there).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.networks.conditions import WINDOWS, BuiltInEncoder, Condition, Window
from LCTfoundLib.networks.features import (
    DEEP,
    PUBLISHED_TIMESTEPS,
    PUBLISHED_UP_BLOCKS,
    FeatureExtractor,
    Features,
    block_maps,
    noise_of,
)
from LCTfoundLib.networks.foundation import FoundationModel
from LCTfoundLib.runtime.device import DeviceChoice
from LCTfoundLib.runtime.files import atomic_path
from training.evaluate.foundation_slices import SIDE

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = [
    "BackboneFeatures",
    "FeatureSettings",
    "GrayFeatures",
    "OnePassFeatures",
    "SliceFeatures",
    "cached",
    "lattice",
    "random_model",
]

#: Blocks of a slice's vector.
_SLICE_BLOCKS = (DEEP, *PUBLISHED_UP_BLOCKS)
_LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class FeatureSettings:
    """How features are read.

    Attributes:
        timesteps: of a slice's vector, as the published adapters.
        pixel_timesteps: of the vectors of a lattice.
        side: pixels of the square in the middle that a slice's vector is of; 160 (240 mm) hold heart, great vessels and
            most of the lungs, and take 40 % of the time of 256.
        stride: pixels between the places of the lattice.
        seed: of the noise; each slice has the same noise in every model.
        batch: slices at a time.
    """

    timesteps: tuple[int, ...] = PUBLISHED_TIMESTEPS
    pixel_timesteps: tuple[int, ...] = (50,)
    side: int = 160
    stride: int = 4
    seed: int = 0
    batch: int = 4


class SliceFeatures(Protocol):
    """What gives features.

    Attributes:
        name: for tables.
        identity: what the features depend on, for the cache.
    """

    name: str
    identity: str

    def of_slices(self, hu: np.ndarray) -> np.ndarray:
        """int16 (N, 3, 256, 256) to float32 (N, D)."""
        ...

    def of_pixels(self, hu: np.ndarray) -> np.ndarray:
        """int16 (N, 3, 256, 256) to float16 (N, P, D), a row for each place of :func:`lattice`."""
        ...


def lattice(stride: int) -> np.ndarray:
    """Rows and columns (P, 2) of places ``stride`` pixels apart in a slice."""
    steps = np.arange(stride // 2, SIDE, stride)
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)


@dataclass
class BackboneFeatures:
    """Features of a frozen backbone.

    Attributes:
        name, identity: see :class:`SliceFeatures`.
        model: with its condition encoder and input.
        settings, choice: how and where.
    """

    name: str
    identity: str
    model: FoundationModel
    settings: FeatureSettings
    choice: DeviceChoice
    _told: dict[Window, Tensor] = field(default_factory=dict, repr=False)

    def of_slices(self, hu: np.ndarray) -> np.ndarray:
        """Mean and standard deviation over space of deep and decoder maps, window after window."""
        cut = (SIDE - self.settings.side) // 2
        middle = hu[:, :, cut : SIDE - cut, cut : SIDE - cut]
        columns = [
            np.concatenate([_moments(found) for found in self._batches(middle, window, self.settings.timesteps)])
            for window in WINDOWS.values()
        ]
        return np.concatenate(columns, axis=1)

    def of_pixels(self, hu: np.ndarray) -> np.ndarray:
        """Decoder maps in the lung window."""
        batches = self._batches(hu, WINDOWS["lung"], self.settings.pixel_timesteps, PUBLISHED_UP_BLOCKS)
        return np.concatenate([_at_places(found, lattice(self.settings.stride)) for found in batches])

    @torch.no_grad()
    def _batches(
        self, hu: np.ndarray, window: Window, timesteps: Sequence[int], blocks: Sequence[int] = _SLICE_BLOCKS
    ) -> Iterator[Features]:
        size = self.settings.batch
        if window not in self._told:
            self._told[window] = self.model.encoder.encode([Condition(window)])
        for start in range(0, len(hu), size):
            # Each slice stands with its own neighbors: the middle one of three is asked for.
            stacks = torch.from_numpy(hu[start : start + size]).float()
            images = torch.cat([self.model.recipe(stack, window)[1:2] for stack in stacks])
            yield self._extracted(images, self._told[window], timesteps, blocks, start)

    def _extracted(
        self, images: Tensor, told: Tensor, timesteps: Sequence[int], blocks: Sequence[int], first: int
    ) -> Features:
        """Of some images, the ``first`` of which tells their noise by its number."""
        network = self.model.to(self.choice.device).network
        extractor = FeatureExtractor(network, blocks, batch=self.settings.batch, dtype=self.choice.dtype)
        noise = [noise_of(self.settings.seed, first + n, images.shape[1:]) for n in range(len(images))]
        return extractor(images, told, timesteps, noise=torch.stack(noise))


@dataclass
class OnePassFeatures(BackboneFeatures):
    """The same blocks of a distilled copy of the backbone, in one pass over the clean slice.

    Attributes:
        network: the copy.
    """

    network: UNet2DConditionModel = field(kw_only=True)

    def _extracted(
        self, images: Tensor, told: Tensor, timesteps: Sequence[int], blocks: Sequence[int], first: int
    ) -> Features:
        device = self.choice.device
        network, images, told = self.network.to(device), images.to(device), told.to(device)
        steps = torch.zeros(len(images), dtype=torch.long, device=device)
        half = self.choice.dtype != torch.float32
        with torch.autocast(device.type, self.choice.dtype if half else torch.bfloat16, enabled=half):
            maps = block_maps(network, images, steps, told.expand(len(images), -1, -1), blocks)
        return Features((0,), {block: maps[block][:, None] for block in blocks})


def _moments(features: Features) -> np.ndarray:
    parts = [maps.float().flatten(3) for maps in features.maps.values()]
    rows = [statistic.flatten(1) for part in parts for statistic in (part.mean(dim=3), part.std(dim=3))]
    return torch.cat(rows, dim=1).cpu().numpy()


def _at_places(features: Features, places: np.ndarray) -> np.ndarray:
    """All maps at places of the slice, as if interpolated to its size (bilinear)."""
    at = torch.from_numpy((places[:, ::-1] + 0.5) / SIDE * 2 - 1).float()[None, None]
    parts = []
    for maps in features.maps.values():
        flat = maps.float().flatten(1, 2)  # timesteps are more channels
        grid = at.to(flat.device).expand(len(flat), -1, -1, -1)
        parts.append(F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0])
    rows = torch.cat(parts, dim=1).transpose(1, 2)
    return rows.clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16).half().cpu().numpy()


def random_model(like: FoundationModel, seed: int) -> FoundationModel:
    """The same network and condition encoder before any training, with the same input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = type(like.network).from_config(like.network.config).requires_grad_(False).eval()
        encoder = BuiltInEncoder().requires_grad_(False).eval()
    return FoundationModel(network, encoder, like.recipe)


@dataclass
class GrayFeatures:
    """No network at all: what a probe can do with the gray values, for scale.

    A slice is its histogram in each window; a place is its value after Gaussian filters of several widths.
    """

    settings: FeatureSettings
    name: str = "gray values"
    identity: str = "gray values 1"

    def of_slices(self, hu: np.ndarray) -> np.ndarray:
        """Shares of 32 gray levels, window after window."""
        cut = (SIDE - self.settings.side) // 2
        middle = torch.from_numpy(hu[:, 1, cut : SIDE - cut, cut : SIDE - cut])
        shown = [window.apply(middle).numpy() for window in WINDOWS.values()]
        rows = [
            np.concatenate([np.histogram(plane, 32, (0, 1))[0] / plane.size for plane in planes])
            for planes in zip(*shown, strict=True)
        ]
        return np.stack(rows).astype(np.float32)

    def of_pixels(self, hu: np.ndarray) -> np.ndarray:
        """Values in both windows, each at six widths up to 48 mm."""
        rows, columns = lattice(self.settings.stride).T
        stacks = []
        for window in WINDOWS.values():
            shown = window.apply(torch.from_numpy(hu[:, 1])).numpy()
            for sigma in (0, 1, 2, 4, 8, 16, 32):
                smooth = ndimage.gaussian_filter(shown, (0, sigma, sigma), mode="nearest") if sigma else shown
                stacks.append(smooth[:, rows, columns])
        return np.stack(stacks, axis=-1).astype(np.float16)


def cached(
    folder: Path, what: str, identity: str, hu: np.ndarray, make: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Features from the cache; computed where model, settings or slices are new.

    Args:
        folder: of the cache.
        what: start of the file's name.
        identity: of model and settings.
        hu: the slices.
        make: from slices to features.
    """
    digest = hashlib.sha256(identity.encode())
    digest.update(np.ascontiguousarray(hu))
    path = folder / f"{what.replace(' ', '_')}-{digest.hexdigest()[:16]}.npy"
    if not path.is_file():
        features = make(hu)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, features)
    return np.load(path)
