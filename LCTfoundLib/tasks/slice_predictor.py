"""The backbone on stacks of slices: each one's noise, told from it and from its neighbors, a few at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from LCTfoundLib.errors import OutOfMemory
from LCTfoundLib.networks.conditions import WIDE, Condition
from LCTfoundLib.networks.foundation import FoundationModel, Slices
from LCTfoundLib.runtime.device import DeviceChoice
from LCTfoundLib.runtime.tiling import is_out_of_memory, release_memory
from LCTfoundLib.tasks.generation import NoisePredictor

__all__ = ["SlicePredictor"]

#: Slices at a time.
_SLICES = 4
#: Image sides that the backbone takes are multiples of this.
_MULTIPLE = 16

_log = logging.getLogger(__name__)


class SlicePredictor:
    """Noise in slices that are each other's neighbors, by the backbone in the window from air to bone.

    When memory runs out: fewer slices at a time, then the CPU.
    """

    def __init__(
        self,
        model: FoundationModel,
        choice: DeviceChoice,
        told: Callable[[float], None] = lambda share: None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        """Set up.

        Args:
            model: moved to the device.
            choice: device and precision of the network.
            told: called with the share of the slices that are done, before each few of them.
            warn: told when the work moves to the CPU.
        """
        self._model, self._told, self._warn = model, told, warn
        self._neighbors = model.recipe.slices is Slices.NEIGHBORS
        self._batch = _SLICES
        self._begin(choice)

    def _begin(self, choice: DeviceChoice) -> None:
        self._model.to(choice.device)
        self.choice, self._predict = choice, NoisePredictor(self._model, Condition(WIDE), 1.0, choice)

    def __call__(self, noisy: Tensor, timestep: int) -> Tensor:
        """The noise in slices.

        Args:
            noisy: (N, H, W) on any device, -1 for -1000 HU and 1 for 1000 HU in a clean image; consecutive, the first
                and the last are their own missing neighbors.
            timestep: of the training.

        Returns:
            float32 (N, H, W) on the device of ``noisy``.

        Raises:
            OutOfMemory: not even one slice on the CPU fits.
        """
        found, done = torch.empty_like(noisy, dtype=torch.float32), 0
        while done < len(noisy):
            self._told(done / len(noisy))
            rows = torch.arange(done, min(done + self._batch, len(noisy)), device=noisy.device)
            try:
                found[rows] = self._noise_in(noisy, rows, timestep).to(noisy.device)
                done += len(rows)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                _log.warning("%s with %d slices on %s", type(error).__name__, len(rows), self.choice.device)
            # Outside of the handler, where its traceback no longer holds the failed run's tensors.
            self._take_less()
        return found

    def _noise_in(self, noisy: Tensor, rows: Tensor, timestep: int) -> Tensor:
        height, width = noisy.shape[-2:]
        steps = (-1, 0, 1) if self._neighbors else (0, 0, 0)
        around = torch.stack([noisy[(rows + step).clamp(0, len(noisy) - 1)] for step in steps], dim=1)
        padded = F.pad(around.to(self.choice.device), (0, -width % _MULTIPLE, 0, -height % _MULTIPLE), mode="replicate")
        answer = self._predict(padded, timestep)[..., :height, :width]
        return answer[:, 1] if self._neighbors else answer.mean(dim=1)

    def _take_less(self) -> None:
        release_memory()
        if self._batch > 1:
            self._batch //= 2
        elif self.choice.device.type != "cpu":
            self._warn("The GPU's memory does not suffice; the computation goes on on the CPU and takes longer.")
            self._begin(self.choice.cpu_fallback())
        else:
            raise OutOfMemory("A slice does not fit into memory; close other programs or crop the CT.")
