"""Two published kinds of networks for few views, trained on what the unrolled net is trained on, to compare with it.

*Post-processing* of the filtered back-projection (FBPConvNet; Jin et al., IEEE T-IP 26 (2017) 4509): a U-Net adds to
the image what the streaks took away. As published: one network after FBP, the residual. Not as published: the U-Net is
this project's ``RestorationNet``, of the unrolled net's width, and is told views, noise and pixel; it is trained by the
unrolled net's loss.

*Dual domain* (DuDoNet, Lin et al., CVPR 2019; DuDoTrans, Wang et al., arXiv 2111.10790): a network restores the
sinogram, FBP leads to the image, a second network restores that with the first FBP beside it; both are trained at once,
with losses on the sinogram, on its FBP and on the image. Not as published: DuDoTrans has Swin transformers where these
are convolutions, DuDoNet removes metal and not streaks; and here 4 times as many views are interpolated, whatever the
number measured.

Only the evaluation uses them; they are not shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LCTfoundLib.networks.restoration import RestorationConfig, RestorationNet, load_restorer
from LCTfoundLib.networks.unrolled import UnrolledInput
from LCTfoundLib.physics.geometry import Beam
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import filtered_back_projection
from LCTfoundLib.weights.registry import Card
from training.shard_stream import Mixture
from training.sparse_scans import ScanTask, SparseScans, soft_error

__all__ = [
    "DUAL_DOMAIN_WEIGHT",
    "POST_PROCESSING_WEIGHT",
    "DualDomainNet",
    "DualDomainTask",
    "PostProcessingNet",
    "PostProcessingTask",
    "denser",
    "load_dual_domain",
    "load_post_processing",
    "more_views",
]

POST_PROCESSING_WEIGHT = "post_processing"
DUAL_DOMAIN_WEIGHT = "dual_domain"

#: What the nets are told: logarithms of the views, of the noise and of the pixel.
_NUMBERS = 3
#: Values that count as "one": views, and the pixel's edge in mm.
_REFERENCE_VIEWS, _REFERENCE_PIXEL_MM = 16, 1.5
#: Views after interpolation, for each measured one.
_DENSER = 4
#: Line integral that counts as "one", in mm of water.
_REFERENCE_PATH_MM = 100.0
_LIMITS = "Trained for a comparison, for a short time on a CPU, on parallel beams; not for use on patients."


def _told(scan: UnrolledInput, projector: Projector) -> Tensor:
    """Numbers for a ``RestorationNet``, (N, 3)."""
    views = math.log2(projector.beam.views / _REFERENCE_VIEWS)
    pixel = math.log2(projector.grid.pixel_mm / _REFERENCE_PIXEL_MM)
    noise = torch.log1p(scan.relative_noise)
    return torch.stack([torch.full_like(noise, views), noise, torch.full_like(noise, pixel)], dim=1)


# -- one network after FBP -------------------------------------------------------------------------------------------


class PostProcessingNet(nn.Module):
    """A network that restores filtered back-projections."""

    def __init__(self, config: RestorationConfig) -> None:
        super().__init__()
        self.image = RestorationNet(config)

    def forward(self, scan: UnrolledInput, projector: Projector) -> Tensor:
        """Images in units of water, (N, H, W)."""
        change = self.image(scan.start[:, None], _told(scan, projector))
        return scan.start + change[:, 0].float()


class PostProcessingTask(ScanTask):
    """Training and scores of a ``PostProcessingNet``.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = POST_PROCESSING_WEIGHT
    architecture = "PostProcessingNet"
    texts = {
        "task": "sparse-view reconstruction",
        "intended_use": "Comparison of methods: a U-Net after filtered back-projection.",
        "limits": _LIMITS,
    }

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        self.shape = _shape(1, config["network"]["image"])
        super().__init__(PostProcessingNet(self.shape), SparseScans(config, mixture, held_out))

    @property
    def parameters(self) -> dict[str, Any]:
        return {"image": self.shape.to_dict()}

    def loss(self, step: int) -> Tensor:
        scan = self.scans.of_step(step, self.device)
        return soft_error(self.run(scan), scan.wanted)


# -- networks in both domains ----------------------------------------------------------------------------------------


class DualDomainNet(nn.Module):
    """Networks that restore the sinogram and the image.

    Args:
        sinogram: sees the interpolated sinogram, and where it was measured.
        image: sees the FBP of the restored sinogram, and that of the measured one.
    """

    def __init__(self, sinogram: RestorationConfig, image: RestorationConfig) -> None:
        super().__init__()
        self.sinogram, self.image = RestorationNet(sinogram), RestorationNet(image)

    def forward(self, scan: UnrolledInput, projector: Projector) -> Tensor:
        """Images in units of water, (N, H, W)."""
        return self.stages(scan, projector)[-1]

    def stages(self, scan: UnrolledInput, projector: Projector) -> tuple[Tensor, Tensor, Tensor]:
        """The restored sinogram (N, 4 x views, detectors) in mm of water, its FBP and the image in units of water."""
        told, dense = _told(scan, projector), denser(projector)
        interpolated = more_views(scan.sinograms)
        measured = torch.zeros_like(interpolated)
        measured[:, ::_DENSER] = 1.0
        seen = torch.stack([interpolated / _REFERENCE_PATH_MM, measured], dim=1)
        change = self.sinogram(seen, told)[:, 0].float() * _REFERENCE_PATH_MM
        restored = interpolated + (1.0 - measured) * change
        back = filtered_back_projection(dense, restored)
        image = back + self.image(torch.stack([back, scan.start], dim=1), told)[:, 0].float()
        return restored, back, image


class DualDomainTask(ScanTask):
    """Training and scores of a ``DualDomainNet``.

    Args:
        config: the parsed TOML file.
        mixture, held_out: of shards.
    """

    name = DUAL_DOMAIN_WEIGHT
    architecture = "DualDomainNet"
    texts = {
        "task": "sparse-view reconstruction",
        "intended_use": "Comparison of methods: networks that restore the sinogram and the image.",
        "limits": _LIMITS,
    }

    def __init__(self, config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> None:
        self.shapes = {name: _shape(2, config["network"][name]) for name in ("sinogram", "image")}
        super().__init__(DualDomainNet(**self.shapes), SparseScans(config, mixture, held_out))

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: shape.to_dict() for name, shape in self.shapes.items()}

    def loss(self, step: int) -> Tensor:
        scan = self.scans.of_step(step, self.device)
        complete = denser(scan.projector).forward(scan.wanted)
        with torch.autocast(scan.wanted.device.type, torch.bfloat16):
            restored, back, image = self.network.stages(scan.measured, scan.projector)
        return (
            soft_error(image, scan.wanted)
            + soft_error(back, scan.wanted)
            + soft_error(restored / _REFERENCE_PATH_MM, complete / _REFERENCE_PATH_MM)
        )


def more_views(sinograms: Tensor) -> Tensor:
    """4 times as many views, linear along the angle; of parallel beams over a half turn.

    After the last view comes the first one seen from behind: its detector is flipped.

    Args:
        sinograms: (N, views, detectors), evenly spaced from angle 0.

    Returns:
        (N, 4 x views, detectors); every 4th is a measured one.
    """
    following = torch.cat([sinograms[:, 1:], sinograms[:, :1].flip(-1)], dim=1)
    parts = [torch.lerp(sinograms, following, step / _DENSER) for step in range(_DENSER)]
    return torch.stack(parts, dim=2).flatten(1, 2)


def denser(projector: Projector) -> Projector:
    """Of the same detector with 4 times as many views."""
    beam: Beam = projector.beam
    return Projector(projector.grid, beam.sparse(_DENSER * beam.views))


# -- both ------------------------------------------------------------------------------------------------------------


def load_post_processing(folder: Path | None = None) -> tuple[PostProcessingNet, Card]:
    """A trained net, in evaluation mode, and its card.

    Raises:
        WeightError: missing or damaged weight, or of another network.
    """
    return load_restorer(
        POST_PROCESSING_WEIGHT,
        folder,
        lambda shapes: PostProcessingNet(RestorationConfig.from_dict(shapes["image"])),
    )


def load_dual_domain(folder: Path | None = None) -> tuple[DualDomainNet, Card]:
    """A trained net, in evaluation mode, and its card.

    Raises:
        WeightError: missing or damaged weight, or of another network.
    """
    return load_restorer(
        DUAL_DOMAIN_WEIGHT,
        folder,
        lambda shapes: DualDomainNet(
            RestorationConfig.from_dict(shapes["sinogram"]), RestorationConfig.from_dict(shapes["image"])
        ),
    )


def _shape(images: int, values: Mapping[str, Any]) -> RestorationConfig:
    """Of a net that sees some images and answers with one."""
    return RestorationConfig.from_dict({"in_channels": images, "out_channels": 1, "numbers": _NUMBERS} | dict(values))
