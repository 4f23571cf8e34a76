"""Training of the published low-dose adapter: cold diffusion, the backbone frozen, a sub-network that adjusts it.

Scans and their targets are those of the one-step net (``training/low_dose.py``); the loss is the published one. What
differs: patches instead of whole slices, for the CPU's sake, and the backbone's window from air to bone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LCTfoundLib.networks.adapter_base import BackboneShape, fingerprint
from LCTfoundLib.networks.cold_diffusion import ColdRestorer
from LCTfoundLib.networks.conditions import WIDE, Condition
from LCTfoundLib.networks.foundation import load_foundation
from LCTfoundLib.tasks.low_dose import COLD_WEIGHT
from training.adapters.fit import restoration_loss
from training.low_dose import LowDoseTask
from training.restoration import slice_psnr
from training.shard_stream import Mixture

__all__ = ["ColdLowDoseTask"]

#: Of the held-out slices' sides that is scored: the way back takes ten passes.
_SCORED = 0.5


class ColdLowDoseTask(LowDoseTask):
    """Training and scores of a ``ColdRestorer`` on the shipped backbone.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = COLD_WEIGHT
    architecture = ColdRestorer.__name__

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        super().__init__(config, mixture, held_out)
        self.patch = int(config["data"]["patch"])

    def build(self, shape: Mapping[str, Any]) -> ColdRestorer:
        model = load_foundation()
        self._backbone = model.network.requires_grad_(False).eval()
        self._embedding = model.encoder.encode([Condition(WIDE)])
        return ColdRestorer(BackboneShape.of(model.network), **shape)

    @property
    def parameters(self) -> dict[str, Any]:
        return self.network.described() | {"backbone": fingerprint(self._backbone)}

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step, 5])
        row, column = (int(at) for at in rng.integers(0, self.size - self.patch + 1, 2))
        pair = self.pair_of(step)
        place = (..., slice(row, row + self.patch), slice(column, column + self.patch))
        device = pair.wanted.device
        self._backbone.to(device)
        batch = {
            "low": shown(pair.slices[place]),
            "clean": shown(pair.wanted[place])[:, None],
            "embedding": self._embedding.to(device),
        }
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            return restoration_loss(self.network, self._backbone, batch, generator)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """As the one-step net's, on the middles of fewer slices; the adapter tells no interval."""
        if self._held_out is None:
            return {}
        pair = self.scored_pair()
        edge = int(self.size * (1 - _SCORED) / 2) // 16 * 16
        place = (slice(None, None, 2), ..., slice(edge, self.size - edge), slice(edge, self.size - edge))
        low, wanted = pair.slices[place], pair.wanted[place]
        self._backbone.to(low.device)
        with torch.autocast(low.device.type, torch.bfloat16):
            images = self.network.run(self._backbone, shown(low), self._embedding.to(low.device), shown(low))
        found = images[:, 0].float() + 1
        return {"input psnr": slice_psnr(low[:, 1], wanted), "psnr": slice_psnr(found, wanted)}


def shown(images: Tensor) -> Tensor:
    """In the backbone's window from air to bone, -1..1, of units of water."""
    return (images - 1).clamp(-1, 1)
