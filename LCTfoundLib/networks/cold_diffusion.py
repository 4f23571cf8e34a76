"""Cold diffusion for low-dose CT: the low-dose slice is the end of a degradation that is gone back step by step.

:class:`ColdDiffusion` is the degradation and the way back, for any restorer. :class:`ColdRestorer` is the adapter: the
backbone frozen, a small sub-network that adjusts it, an output layer for the restored slice.

Source: cold diffusion, Bansal et al., NeurIPS 2023, arXiv 2208.09392; the mean-preserving degradation, the context of
three slices and the modulation by the last estimate, CoreDiff, Gao et al., IEEE TMI 2024, arXiv 2304.01814.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from LCTfoundLib.networks.adapter_base import Adapter, BackboneShape, repeated
from LCTfoundLib.networks.features import NoiseSchedule
from LCTfoundLib.networks.side_branch import SideBranch, predict_beside

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["PUBLISHED_COLD_TIMESTEPS", "ColdDiffusion", "ColdRestorer", "EndState", "Restorer"]

#: The backbone's timestep at each step of the way back, as published: the number of the step.
PUBLISHED_COLD_TIMESTEPS = tuple(range(10))
#: The slice between its neighbors.
_MIDDLE = slice(1, 2)


class EndState(StrEnum):
    """Which degraded end the next state is made with."""

    #: What the state and the estimate imply together (CoreDiff): the last estimate is the answer.
    IMPLIED = "implied"
    #: The low-dose slice itself (cold diffusion): the answer is the mean of all estimates.
    MEASURED = "measured"


class Restorer(Protocol):
    """Estimates the clean slice."""

    def __call__(self, state: Tensor, step: int, previous: Tensor) -> Tensor:
        """The estimate.

        Args:
            state: x_t, (N, 1, H, W).
            step: t, from the number of steps down to 1.
            previous: the last estimate, (N, 1, H, W); at first the low-dose slice.
        """
        ...


@dataclass(frozen=True)
class ColdDiffusion:
    """The degradation from a clean slice to the low-dose one in ``steps`` steps, and back.

    Attributes:
        steps: T, at least 1.
    """

    steps: int = len(PUBLISHED_COLD_TIMESTEPS)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps")

    def kept(self, step: int | Tensor) -> float | Tensor:
        """Share of the clean slice that is left at a step: 1 at 0, 0 at T."""
        return 1.0 - step / self.steps

    def degrade(self, clean: Tensor, low: Tensor, step: int | Tensor) -> Tensor:
        """D(x_0, x_T, t): the clean slice and the low-dose one mixed, so that their common mean is kept at every step.

        Args:
            clean: x_0, (N, C, H, W).
            low: x_T, (N, C, H, W).
            step: t, 0 to T, one or (N,).

        Returns:
            x_t, (N, C, H, W); x_0 itself at 0, x_T itself at T.
        """
        if isinstance(step, Tensor):
            step = step.view(-1, 1, 1, 1).to(clean.dtype)
        kept = self.kept(step)
        return kept * clean + (1.0 - kept) * low

    def step_back(
        self, state: Tensor, estimate: Tensor, low: Tensor, step: int, end: EndState = EndState.IMPLIED
    ) -> Tensor:
        """x_{t-1} = x_t - D(estimate, x_T, t) + D(estimate, x_T, t - 1).

        The difference corrects the error of the estimate: where it is wrong, both D are, and x_t keeps its share.

        Args:
            state: x_t, (N, C, H, W).
            estimate: of x_0.
            low: the low-dose slice.
            step: t, 1 to T.
            end: what x_T is.

        Returns:
            x_{t-1}, (N, C, H, W).
        """
        if end is EndState.MEASURED:
            return state + (estimate - low) / self.steps  # both D's differ by one T-th of the way
        # With the implied end D(estimate, x_T, t) is the state itself, and x_T is left out of the difference.
        left = (step - 1) / step
        return estimate + left * (state - estimate)

    def restore(self, restorer: Restorer, low: Tensor, end: EndState = EndState.IMPLIED) -> Tensor:
        """The way back from a low-dose slice.

        Args:
            restorer: estimates the clean slice from a state.
            low: (N, 1, H, W).
            end: see :class:`EndState`.

        Returns:
            (N, 1, H, W).
        """
        state = previous = low
        for step in range(self.steps, 0, -1):
            previous = restorer(state, step, previous)
            state = self.step_back(state, previous, low, step, end)
        return state


class ColdRestorer(Adapter):
    """Restores low-dose slices with a frozen backbone, step by step.

    The backbone sees the state between the low-dose slices below and above it. The sub-network sees the last estimate
    and the three low-dose slices, knows the step by the backbone's own embedding of it, and shifts the backbone's maps.
    The output layer is replaced by one that gives the difference between the estimate and the state, as published.

    Two things differ from the published sub-network. Its shifts are one number per channel and slice; here they are
    maps, since on a frozen backbone they are nearly all that learns, and a low-dose slice is not equally noisy
    everywhere: streaks between the shoulders. And it works at the first step too, where the state is the last estimate.
    """

    def __init__(
        self,
        needs: BackboneShape,
        width: int = 32,
        timesteps: Sequence[int] = PUBLISHED_COLD_TIMESTEPS,
        end: EndState | str = EndState.IMPLIED,
    ) -> None:
        """Fresh values: every estimate is the state, the low-dose slice comes back.

        Args:
            needs: shape of the backbone.
            width: of the sub-network's finest level.
            timesteps: the backbone's, at the steps 1 to T; a frozen backbone knows noise best where its timestep has
                as much of it as the state.
            end: see :class:`EndState`.
        """
        super().__init__()
        self.timesteps = tuple(int(step) for step in timesteps)
        if not self.timesteps or not all(0 <= step < NoiseSchedule.steps for step in self.timesteps):
            raise ValueError(f"timesteps {self.timesteps} must be between 0 and {NoiseSchedule.steps - 1}")
        self.shape, self.width, self.end = needs, width, EndState(end)
        self.diffusion = ColdDiffusion(len(self.timesteps))
        self.branch = SideBranch(needs, 4, width)
        self.conv_out = nn.Conv2d(needs.widths[0], 1, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    @property
    def needs(self) -> BackboneShape:
        return self.shape

    @property
    def arguments(self) -> dict[str, Any]:
        return {"width": self.width, "timesteps": self.timesteps, "end": str(self.end)}

    @classmethod
    def from_card(cls, needs: Mapping[str, Any], arguments: Mapping[str, Any]) -> ColdRestorer:
        return cls(BackboneShape.from_dict(needs), **arguments)

    def replaced(self) -> dict[str, Tensor]:
        return {f"conv_out.{name}": tensor for name, tensor in self.conv_out.named_parameters()}

    def estimate(
        self,
        network: UNet2DConditionModel,
        state: Tensor,
        step: int | Tensor,
        previous: Tensor,
        low: Tensor,
        embedding: Tensor,
    ) -> Tensor:
        """The clean slice, estimated.

        Args:
            network: the backbone, with the adapter's tensors.
            state: x_t, (N, 1, H, W).
            step: t, 1 to T, one or (N,).
            previous: the last estimate, (N, 1, H, W).
            low: the low-dose slice with the ones below and above it, (N, 3, H, W).
            embedding: of the condition, (N, 1, 768).

        Returns:
            (N, 1, H, W).
        """
        steps = step if isinstance(step, Tensor) else repeated(step, state)
        timesteps = torch.tensor(self.timesteps, device=state.device)[steps - 1]
        between = torch.cat([low[:, :1], state, low[:, 2:]], dim=1)
        seen = torch.cat([previous, low], dim=1)
        return state + predict_beside(network, self.branch, between, timesteps, embedding, seen)

    def answer(self, network: UNet2DConditionModel, images: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        """The restored slices between their neighbors: ``images`` (N, 3, H, W) low dose to (N, 1, H, W), -1..1.

        ``noise`` is of no use here: the way back is deterministic.
        """

        def restorer(state: Tensor, step: int, previous: Tensor) -> Tensor:
            return self.estimate(network, state, step, previous, images, embedding)

        return self.diffusion.restore(restorer, images[:, _MIDDLE], self.end)
