"""Images that the backbone finds likely and the measurements allow: diffusion posterior sampling with data consistency.

Each step of the way from noise to an image asks the backbone for the clean image, brings that near to the sinogram by a
few steps of conjugate gradients begun there, and goes on from the corrected one (DDS; Chung et al., ICLR 2024, arXiv
2303.05754): nothing is differentiated through the network. The way begins at a reconstruction under some noise rather
than at noise alone (Chung et al., "Come-closer-diffuse-faster", CVPR 2022): a twentieth of the published 2,000 steps
will do. Several draws tell what the measurements leave open: their mean is the best guess, their deviation how sure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from LCTfoundLib.networks.null_space import NullSpaceSettings, sample_null_space
from LCTfoundLib.networks.unrolled import UnrolledInput, operator_norm
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import conjugate_gradient

__all__ = ["PosteriorSettings", "sample_posterior"]


@dataclass(frozen=True)
class PosteriorSettings:
    """How a sample is drawn.

    Attributes:
        steps: evaluations of the backbone.
        first: timestep to begin at. The less a backbone has learned, the lower; the shipped one's draws from 50 on are
            farther from the truth than where they begin.
        trust: in the backbone's image against the measurements without noise, as a share of the projector's squared
            norm.
        consistency: steps of conjugate gradients in each step.
        fresh: share of a step's noise that is drawn anew: 0 follows one path (DDIM), 1 forgets it.
    """

    steps: int = 2
    first: int = 15
    trust: float = 0.02
    consistency: int = 4
    fresh: float = 0.85

    def __post_init__(self) -> None:
        _ = self.way  # which checks its own
        if not (self.trust > 0 and self.consistency >= 0):
            raise ValueError(f"trust {self.trust}, {self.consistency} steps")

    @property
    def way(self) -> NullSpaceSettings:
        """From noise to an image."""
        return NullSpaceSettings(self.steps, self.first, self.fresh)


def sample_posterior(
    predict: Callable[[Tensor, int], Tensor],
    scan: UnrolledInput,
    projector: Projector,
    start: Tensor,
    settings: PosteriorSettings | None = None,
    seed: int = 0,
    number: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """One draw of the slices of a scan.

    Args:
        predict: noise in (N, H, W) at a timestep of the training, in the window from air to bone (-1 is -1000 HU, 1 is
            1000 HU); the slices may see their neighbors.
        scan: what was measured.
        projector: of the scan.
        start: reconstruction to begin at, in units of water, (N, H, W).
        settings: how.
        seed: of the noise.
        number: of the draw.
        told: called with the number of finished steps before each.

    Returns:
        In units of water, (N, H, W).
    """
    settings = settings or PosteriorSettings()
    strength = settings.trust * operator_norm(projector) ** 2 * (1.0 + scan.relative_noise)[:, None, None]

    def consistent(clean: Tensor) -> Tensor:
        return _consistent(scan, projector, clean + 1.0, strength, settings.consistency) - 1.0

    return sample_null_space(predict, consistent, start - 1.0, settings.way, seed, number, told) + 1.0


def _consistent(scan: UnrolledInput, projector: Projector, image: Tensor, strength: Tensor, steps: int) -> Tensor:
    if not steps:
        return image
    return conjugate_gradient(
        projector, scan.sinograms, iterations=steps, prior=image, strength=strength, weights=scan.weights
    )
