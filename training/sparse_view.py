"""The unrolled reconstruction's training: chests scanned with few views, with and without quantum noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from LCTfoundLib.networks.restoration import RestorationConfig
from LCTfoundLib.networks.unrolled import UNROLLED_WEIGHT, UnrolledConfig, UnrolledNet
from training.shard_stream import Mixture
from training.sparse_scans import Scan, ScanTask, SparseScans, soft_error

__all__ = ["SparseViewTask"]

#: Weight of an iteration's error against the next one's.
_EARLIER = 0.6
#: Weight of the scale's likelihood: the trunk belongs to the image.
_SCALE_WEIGHT = 0.01
_TEXTS = {
    "task": "sparse-view reconstruction",
    "intended_use": "Reconstruction of chest CT slices from few X-ray views, for research.",
    "limits": (
        "Research use, no medical device. What few views do not show is filled in from what chests look like, and may "
        "be wrong without looking so; the predicted error is trained on the same kind of images. Trained for a short "
        "time on a CPU, mostly on parallel beams."
    ),
}


class SparseViewTask(ScanTask):
    """Training and scores of an ``UnrolledNet``.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = UNROLLED_WEIGHT
    architecture = "UnrolledNet"
    texts = _TEXTS

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        shape, defaults = config["network"], UnrolledConfig()
        prior = RestorationConfig.from_dict(defaults.prior.to_dict() | shape.get("prior", {}))
        self.shape = UnrolledConfig(shape["iterations"], shape["steps"], prior)
        super().__init__(UnrolledNet(self.shape), SparseScans(config, mixture, held_out))

    @property
    def parameters(self) -> dict[str, Any]:
        return self.shape.to_dict()

    def loss(self, step: int) -> Tensor:
        scan = self.scans.of_step(step, self.device)
        result = self.run(scan)
        count = len(result.iterates)
        weights = [_EARLIER ** (count - 1 - n) for n in range(count)]
        loss = sum(
            weight * soft_error(image, scan.wanted) for weight, image in zip(weights, result.iterates, strict=True)
        ) / sum(weights)
        missed = (result.images - scan.wanted).detach().abs()
        return loss + _SCALE_WEIGHT * (result.scale.log() + missed / result.scale).mean()

    def images(self, scan: Scan) -> Tensor:
        return self.run(scan).images
