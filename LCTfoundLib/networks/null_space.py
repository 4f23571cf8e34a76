"""Images that the backbone finds likely and that agree exactly with what was measured: denoising diffusion null-space
models (DDNM; Wang et al., ICLR 2023, arXiv 2212.00490), begun at an interpolated image.

Each step asks the backbone for the clean image and replaces the part of it that was measured (the range of A+) by the
measurement; what the measurement does not tell (the null space of A) is the backbone's. Nothing is trained. The way
begins at an image under some noise rather than at noise alone (Chung et al., "Come-closer-diffuse-faster", CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from LCTfoundLib.networks.features import NoiseSchedule, noise_of
from LCTfoundLib.networks.sampling import timesteps

__all__ = ["NullSpaceSettings", "sample_null_space"]

#: Draws of noise that one sample may make; the draws of the next one follow.
_DRAWS = 1000


@dataclass(frozen=True)
class NullSpaceSettings:
    """How a sample is drawn.

    Attributes:
        steps: evaluations of the backbone.
        first: timestep to begin at. The less a backbone has learned, the lower: what it makes of much noise is then
            worse than the interpolation. With the shipped one, on five tuning slices of 256 pixels made four times
            coarser, four draws from 20 gain 0.6 dB on bicubic interpolation; one draw from 20 gains nothing, one from
            50 loses 0.7 dB, from 100 1.8 dB.
        fresh: share of a step's noise that is drawn anew: 0 follows one path (DDIM), 1 forgets it; the paper's is 0.85.
            An exact Gaussian prior's draws have, with 20 steps from 400, 0.92 of the right deviation with 0 and 0.81
            with 0.85; but drawing anew corrects what an inexact one predicts.
    """

    steps: int = 10
    first: int = 20
    fresh: float = 0.85

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.first + 1 <= NoiseSchedule.steps:
            raise ValueError(f"{self.steps} steps from timestep {self.first}")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"{self.fresh} of the noise fresh")


def sample_null_space(
    predict: Callable[[Tensor, int], Tensor],
    consistent: Callable[[Tensor], Tensor],
    start: Tensor,
    settings: NullSpaceSettings | None = None,
    seed: int = 0,
    number: int = 0,
    told: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """One draw of a stack of slices.

    Args:
        predict: noise in (N, H, W) at a timestep of the training; the slices may see their neighbors.
        consistent: makes a stack agree with what was measured.
        start: (N, H, W) to begin at, -1..1.
        settings: how.
        seed: of the noise.
        number: of the draw.
        told: called with the number of finished steps before each.

    Returns:
        (N, H, W), consistent; beyond -1..1 where consistency asks for it.
    """
    settings = settings or NullSpaceSettings()
    schedule, times = NoiseSchedule(), timesteps(settings.steps, settings.first)

    def noise(draw: int) -> Tensor:
        return noise_of(seed, number * _DRAWS + draw, start.shape).to(start)

    clean = start
    state = float(schedule.signal[times[0]]) * start + float(schedule.noise[times[0]]) * noise(0)
    for done, step in enumerate(times):
        told(done)
        signal, share = float(schedule.signal[step]), float(schedule.noise[step])
        clean = consistent(((state - share * predict(state, step)) / signal).clamp(-1.0, 1.0))
        if done + 1 == len(times):
            break
        left = (state - signal * clean) / share
        mixed = (1.0 - settings.fresh**2) ** 0.5 * left + settings.fresh * noise(done + 1)
        state = float(schedule.signal[times[done + 1]]) * clean + float(schedule.noise[times[done + 1]]) * mixed
    return clean
