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
from LCTfoundLib.volume import Volume
from LCTfoundLib.weights.registry import Card, load_weight

__all__ = ["COARSE", "FINE", "CoarseProbabilities", "LoadedNet", "load_net", "predict_coarse"]

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


def load_net(name: str, folder: Path | None = None) -> LoadedNet:
    """Load a shipped segmentation net with BatchNorm folded, in channels-last layout.

    Raises:
        WeightError: missing or damaged weight.
    """
    card, state = load_weight(name, folder)
    network = UNet3D(UNet3DConfig.from_dict({**card.architecture_parameters, "auxiliary": []}))
    network.load_state_dict(state)
    return LoadedNet(fuse_batch_norm(network).to(memory_format=torch.channels_last_3d), card)


def predict_coarse(net: LoadedNet, ct: Volume, box: LungBox, device: torch.device, dtype: torch.dtype) -> CoarseProbabilities:
    """One pass over the whole (resampled, cropped) chest; at 2.5 mm it fits any machine."""
    image = network_input(torch.from_numpy(np.ascontiguousarray(ct.array)).to(device), ct.spacing, ct.origin, box)
    padded, crop = _pad(image, net.network.config.divisor)
    network = net.network.to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = network(padded[None].contiguous(memory_format=torch.channels_last_3d))[:, :, *crop]
    regions, trees = (part[0].float().softmax(0).cpu().numpy() for part in network.split(logits))
    return CoarseProbabilities(ct, regions, trees)


def _pad(image: Tensor, divisor: int) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pad (C, k, j, i) at the far ends to multiples of ``divisor``; the slices take the padding off again."""
    sizes = image.shape[1:]
    extra = [-size % divisor for size in sizes]
    padded = F.pad(image, (0, extra[2], 0, extra[1], 0, extra[0]), mode="replicate")
    return padded, (slice(0, sizes[0]), slice(0, sizes[1]), slice(0, sizes[2]))
