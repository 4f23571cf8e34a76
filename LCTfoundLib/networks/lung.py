"""Running the coarse and the fine lung nets: from a canonical CT to probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.networks.inputs import LungBox, network_input
from LCTfoundLib.networks.unet3d import UNet3D, UNet3DConfig, fuse_batch_norm
from LCTfoundLib.runtime.device import DeviceChoice
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.runtime.tiling import sliding_window
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card, load_weight

__all__ = [
    "COARSE",
    "FINE",
    "CoarseProbabilities",
    "FineProbabilities",
    "LoadedNet",
    "load_net",
    "predict_coarse",
    "predict_fine",
]

#: Names of the shipped weights.
COARSE, FINE = "lung_coarse", "lung_fine"


@dataclass
class LoadedNet:
    """A net ready for inference and the card of its weight."""

    network: UNet3D
    card: Card


@dataclass
class CoarseProbabilities:
    """The coarse net's answer on its own grid.

    Attributes:
        grid: the resampled CT the net saw, (k, j, i).
        regions: float32 (26, k, j, i): background, 18 segments, ``Context`` organs; sums to 1.
        trees: float32 (4, k, j, i): background, airway, artery, vein; sums to 1.
    """

    grid: Volume
    regions: np.ndarray
    trees: np.ndarray

    @property
    def lungs(self) -> np.ndarray:
        """Probability of any segment."""
        return self.regions[1:19].sum(axis=0)


@dataclass
class FineProbabilities:
    """The fine net's answer on its own grid; zeros where it was not asked.

    Attributes:
        grid: the resampled CT the net saw, (k, j, i).
        trees: float16 (3, k, j, i): airway, artery, vein.
        lobes: float16 (6, k, j, i): outside, ``Lobe`` 1-5.
    """

    grid: Volume
    trees: np.ndarray
    lobes: np.ndarray


def load_net(name: str, folder: Path | None = None) -> LoadedNet:
    """Load a shipped segmentation net with BatchNorm folded, in channels-last layout.

    Raises:
        WeightError: missing or damaged weight.
    """
    card, state = load_weight(name, folder)
    network = UNet3D(UNet3DConfig.from_dict({**card.architecture_parameters, "auxiliary": []}))
    network.load_state_dict(state)
    fused = fuse_batch_norm(network)
    # torch's own type stubs lack this overload of Module.to.
    return LoadedNet(fused.to(memory_format=torch.channels_last_3d), card)  # type: ignore[call-overload]


def predict_coarse(net: LoadedNet, ct: Volume, box: LungBox, choice: DeviceChoice) -> CoarseProbabilities:
    """One pass over the whole (resampled, cropped) chest; at 3 mm it fits any machine."""
    device = choice.device
    image = network_input(torch.from_numpy(np.ascontiguousarray(ct.array)).to(device), ct.spacing, ct.origin, box)
    padded, crop = _pad(image, net.network.config.divisor)
    network = net.network.to(device)
    with torch.inference_mode(), torch.autocast(device.type, choice.dtype, enabled=choice.dtype != torch.float32):
        logits = network(padded[None].contiguous(memory_format=torch.channels_last_3d))[:, :, *crop]
    regions, trees = (part[0].float().softmax(0).cpu().numpy() for part in network.split(logits))
    return CoarseProbabilities(ct, regions, trees)


def predict_fine(
    net: LoadedNet,
    ct: Volume,
    box: LungBox,
    mask: np.ndarray,
    choice: DeviceChoice,
    overlap: float,
    tile: tuple[int, int, int] = (96, 96, 96),
    progress: Progress | None = None,
) -> FineProbabilities:
    """Tiles over the part of the CT that ``mask`` marks.

    Args:
        net: the fine net.
        ct: HU on a canonical isotropic grid.
        box: the lungs' bounding box.
        mask: bool [k, j, i], where the answer is needed.
        choice: device and precision.
        overlap: share of a tile that overlaps with the next.
        tile: size (k, j, i).
        progress: told after each tile.
    """
    image = torch.from_numpy(np.ascontiguousarray(ct.array))[None]

    def prepare(part: Tensor, start: tuple[int, int, int]) -> Tensor:
        x, y, z = (o + s * n for o, s, n in zip(ct.origin, ct.spacing, start[::-1], strict=True))
        return network_input(part[0], ct.spacing, (x, y, z), box)

    def reduce(planes: Tensor) -> Tensor:
        trees, lobes = net.network.split(planes.float()[None])
        return torch.cat([trees[0].softmax(0)[1:], lobes[0].softmax(0)]).to(torch.float16)

    result = sliding_window(
        net.network,
        image,
        tile,
        net.network.config.out_channels,
        overlap=overlap,
        batch=4 if choice.device.type == "cuda" else 1,
        device=choice,
        progress=progress,
        prepare=prepare,
        reduce=reduce,
        mask=mask,
        multiple=net.network.config.divisor,
    ).numpy()
    outside = ~mask
    result[:, outside] = 0  # where nothing was asked the logits are zero, not an answer
    return FineProbabilities(ct, result[:3], result[3:])


def _pad(image: Tensor, divisor: int) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pad (C, k, j, i) at the far ends to multiples of ``divisor``; the slices take the padding off again."""
    sizes = image.shape[1:]
    extra = [-size % divisor for size in sizes]
    padded = F.pad(image, (0, extra[2], 0, extra[1], 0, extra[0]), mode="replicate")
    return padded, (slice(0, sizes[0]), slice(0, sizes[1]), slice(0, sizes[2]))
