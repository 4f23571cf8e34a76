"""Train the single-pass extractor of a backbone, and measure how near it comes to the four noisy passes.

    python -m training.distill_features --model backbone_student --weights runs/foundation \
        --shards runs/shards/phantom --shards runs/shards/real --held-out runs/shards/validation --out runs/distilled

Writes ``distilled.safetensors`` and ``report.json``: cosine of each block at the beginning and at the end, on held-out
slices, and between two draws of the noisy passes' own noise, which is the most that any clean pass can be expected to
reach; seconds a slice of both.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.features import (
    FeatureExtractor,
    Features,
    SinglePassExtractor,
    distillation_loss,
    distillation_step,
)
from LCTfoundLib.networks.foundation import FoundationModel, load_foundation
from LCTfoundLib.runtime.files import atomic_path
from training.shard_stream import Augmentation, Mixture, SliceSampler, Source

__all__ = ["Distiller", "load_distilled", "main"]


class Distiller:
    """Training of one extractor.

    Args:
        model: the backbone; stays as it is.
        sampler, held_out: of slices to learn from and to measure on.
        rate: of learning.
        batch: slices a step.
    """

    def __init__(
        self, model: FoundationModel, sampler: SliceSampler, held_out: SliceSampler, rate: float = 1e-4, batch: int = 4
    ) -> None:
        self.model, self._sampler, self._held_out, self._batch = model, sampler, held_out, batch
        self.teacher = FeatureExtractor(model.network, batch=4)
        self.student = SinglePassExtractor(model.network).train()
        self._optimizer = torch.optim.AdamW(self.student.parameters(), lr=rate, weight_decay=0.0)

    def batch_of(self, sampler: SliceSampler, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) and embeddings (N, 1, 768) of consecutive samples."""
        samples = [sampler(number) for number in range(first, first + count)]
        with torch.no_grad():
            told = self.model.encoder.encode([sample.condition for sample in samples])
        return torch.stack([sample.image for sample in samples]), told

    def fit(self, seconds: float, seed: int = 0) -> int:
        """Train for a time; how many steps."""
        generator, begin, step = torch.Generator().manual_seed(seed), time.monotonic(), 0
        while time.monotonic() - begin < seconds:
            images, told = self.batch_of(self._sampler, step * self._batch, self._batch)
            distillation_step(self.student, self.teacher, images, told, self._optimizer, generator)
            step += 1
        return step

    @torch.no_grad()
    def agreement(self, count: int = 16) -> dict[str, dict[int, float]]:
        """Mean cosine per block on held-out slices: of the single pass, and of another draw of noise, to noisy maps."""
        self.student.eval()
        images, told = self.batch_of(self._held_out, 0, count)
        first, second = (self._noisy(images, told, seed) for seed in (101, 202))
        single = distillation_loss(self.student(images, told), first)[1]
        self.student.train()
        return {"single pass": single, "other noise": distillation_loss(second, first)[1]}

    def _noisy(self, images: Tensor, told: Tensor, seed: int) -> Features:
        return self.teacher(images, told, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def seconds_a_slice(self, size: int = 256, repeats: int = 3) -> dict[str, float]:
        """Of four noisy passes, of the single pass with its heads, and of its own maps alone."""
        self.student.eval()
        image = torch.rand(1, 3, size, size) * 2 - 1
        told = torch.zeros(1, 1, 768)
        calls = {
            "four timesteps": lambda: self.teacher(image, told, generator=torch.Generator().manual_seed(0)),
            "single pass": lambda: self.student(image, told),
            "single pass, clean maps": lambda: self.student.clean(image, told),
        }
        table = {}
        for name, call in calls.items():
            times = []
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            table[name] = round(min(times[1:]), 4)
        self.student.train()
        return table


def load_distilled(path: Path, model: FoundationModel) -> SinglePassExtractor:
    """A trained extractor of a backbone.

    Raises:
        LCTfoundError: the file is none, or of another backbone.
    """
    extractor = SinglePassExtractor(model.network)
    try:
        extractor.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LCTfoundError(
            f"{path} is no single-pass extractor of this backbone ({reason}); train it again."
        ) from error
    return extractor.requires_grad_(False).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a single-pass feature extractor.")
    parser.add_argument("--model", default="backbone_student")
    parser.add_argument("--weights", type=Path, help="folder of the weight")
    parser.add_argument("--shards", type=Source.parse, action="append", required=True, metavar="FOLDER[:SHARE]")
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        model = load_foundation(options.model, options.weights)
        shown = Augmentation(size=options.size, whole=0.3)
        sampler = SliceSampler(Mixture(options.shards, 1), shown, model.recipe, seed=1)
        held_out = SliceSampler(Mixture([Source(options.held_out)], 2), shown, model.recipe, seed=2, drop=False)
        distiller = Distiller(model, sampler, held_out)
        before = distiller.agreement()
        steps = distiller.fit(options.minutes * 60)
        report = {
            "steps": steps,
            "cosine before": before,
            "cosine after": distiller.agreement(),
            "seconds a slice": distiller.seconds_a_slice(),
            "threads": torch.get_num_threads(),
        }
        with atomic_path(options.out / "distilled.safetensors") as weights:
            save_file({key: value.contiguous() for key, value in distiller.student.state_dict().items()}, weights)
        with atomic_path(options.out / "report.json") as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    except LCTfoundError as error:
        parser.exit(2, f"{error}\n")
    parser.exit(0, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
