"""Train the nets that restore images: sparse view, low dose, thick slices.

    python -m training.restoration training/configs/sparse_view.toml --shards runs/shards/phantom:0.5 \
        --shards runs/shards/real:0.5 --out runs/sparse_view

A step's samples are a pure function of the seed and the step. The run folder holds one checkpoint and ``log.jsonl``;
starting the same command again resumes there. ``--export FOLDER`` writes the averaged weights with a card instead.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.runtime.files import atomic_path, output_errors
from LCTfoundLib.weights.registry import Card, DataSource, load_weight, save_weight
from training.export_backbone import DATA_NAMES, strictest
from training.segmentation import StopOnSignal, commit_hash, hardware
from training.shard_stream import Augmentation, Mixture, Source

__all__ = ["ImageSampler", "RestorationTask", "Trainer", "main", "slice_psnr", "task_of"]

#: Range that images are judged in, in units of water: -1000 to 1000 HU.
_BRIGHTEST = 2.0


class ImageSampler:
    """Slices in HU by their number, augmented: no window, air at -1000 HU.

    Args:
        mixture: of shards.
        augmentation: its size is that of the images.
        seed: of the run.
        neighbors: of a slice on either side that come with it.
    """

    def __init__(self, mixture: Mixture, augmentation: Augmentation, seed: int, neighbors: int = 0) -> None:
        self.mixture, self.augmentation, self.seed, self.neighbors = mixture, augmentation, seed, neighbors

    def __call__(self, number: int) -> Tensor:
        """float32 (1 + 2 neighbors, size, size), HU, -1000 at least."""
        rng = np.random.default_rng([self.seed, number])
        index, place = self.mixture(number)
        levels = [place]
        for _ in range(self.neighbors):
            levels = [index.neighbors(levels[0])[0], *levels, index.neighbors(levels[-1])[2]]
        hu = torch.from_numpy(np.stack([index.read(level) for level in levels]))
        return self.augmentation.place(hu, rng).clamp(min=-1000.0)


def slice_psnr(images: Tensor, wanted: Tensor) -> float:
    """Mean over slices in units of water, (N, H, W), the peak being 2,000 HU."""
    square = (images.clamp(0, _BRIGHTEST) - wanted.clamp(0, _BRIGHTEST)).square().mean(dim=(1, 2))
    return float((10 * torch.log10(_BRIGHTEST**2 / square)).mean())


class RestorationTask(Protocol):
    """What is trained, on what."""

    #: Of the weight's card.
    name: str
    network: nn.Module
    architecture: str

    @property
    def parameters(self) -> dict[str, Any]:
        """What the network is built from, for the card."""
        ...

    @property
    def texts(self) -> dict[str, str]:
        """``task``, ``intended_use`` and ``limits`` of the card."""
        ...

    def loss(self, step: int) -> Tensor:
        """Of a step's samples."""
        ...

    def scores(self) -> dict[str, float]:
        """Of the network as it is, on held-out samples."""
        ...


class Trainer:
    """One run of one task.

    Args:
        config: the parsed TOML file.
        task: holds the network.
        run: its folder.
        data: names and licenses of what is trained on.
    """

    def __init__(
        self, config: Mapping[str, Any], task: RestorationTask, run: Path, data: Sequence[tuple[str, str]]
    ) -> None:
        self.config, self.task, self.run, self.data = config, task, run, list(data)
        run.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = task.network.to(self.device)
        settings = config["optimizer"]
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings["lr"], weight_decay=0.0)
        self.average = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self._resume()

    def fit(self, max_seconds: float = math.inf, log_every: int = 20, score_every: int = 200) -> None:
        """Train to the configured step, or until the time is up or a signal asks to stop; then save."""
        stop, begin = StopOnSignal(), time.monotonic()
        last_save, losses = begin, []
        total = int(self.config["optimizer"]["steps"])
        while self.step < total and not stop.requested and time.monotonic() - begin < max_seconds:
            tick = time.monotonic()
            losses.append(self._train_step())
            self.step += 1
            self.seconds += time.monotonic() - tick
            if self.step % log_every == 0:
                self._log({"loss": sum(losses) / len(losses), "lr": self.optimizer.param_groups[0]["lr"]})
                losses = []
            if self.step % score_every == 0:
                self._log(self.scores())
            if time.monotonic() - last_save > 120:
                self.save()
                last_save = time.monotonic()
        self._log(self.scores())
        self.save()

    def rate(self, step: int) -> float:
        """The learning rate's factor: linear warm-up, then a cosine to 0; a function of the step alone."""
        settings = self.config["optimizer"]
        warmup, total = int(settings["warmup"]), int(settings["steps"])
        rise = min(1.0, (step + 1) / max(warmup, 1))
        return rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(total - warmup, 1)))

    def _train_step(self) -> float:
        settings = self.config["optimizer"]
        for group in self.optimizer.param_groups:
            group["lr"] = settings["lr"] * self.rate(self.step)
        self.network.train()
        loss = self.task.loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.get("clip", 1.0))
        if torch.isfinite(norm):  # a rare overflow must not poison the weights
            self.optimizer.step()
            self._average(min(settings["ema"], (1 + self.step) / (10 + self.step)))
        return float(loss.detach())

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for key, value in self.network.state_dict().items():
            self.average[key].lerp_(value, 1 - decay)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Of the averaged weights."""
        kept = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        self.network.eval()
        try:
            return self.task.scores()
        finally:
            self.network.load_state_dict(kept)

    def save(self) -> None:
        """Write the checkpoint beside and rename it when it is whole.

        Raises:
            OutputError: the disk is full or cannot be written; the last checkpoint stays.
        """
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        with output_errors(self.run), atomic_path(self.run / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])

    def start_from(self, folder: Path) -> None:
        """Begin with the averaged weights of another run, or with a weight of the task's name in a weights folder.

        A run that has begun keeps its own.

        Raises:
            WeightError: the folder holds neither.
        """
        if self.step:
            return
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            found = torch.load(checkpoint, map_location=self.device, weights_only=True)["average"]
        elif (folder / f"{self.task.name}.safetensors").exists():
            _, found = load_weight(self.task.name, folder)
        else:
            raise WeightError(f"{folder} holds neither a run's checkpoint nor a weight '{self.task.name}'.")
        self.network.load_state_dict(found)
        self.average = {key: value.detach().clone() for key, value in self.network.state_dict().items()}

    def export(self, folder: Path, version: str, numbers: dict[str, Any]) -> Card:
        """Write the averaged weights in float16 with a card."""
        sources = tuple(DataSource(DATA_NAMES.get(name, name), kind.replace(" ", "-")) for name, kind in self.data)
        card = Card(
            name=self.task.name,
            version=version,
            architecture=self.task.architecture,
            architecture_parameters=self.task.parameters,
            spacing=(1.5, 1.5, 2.5),
            classes=(),
            data=sources,
            license=strictest([source.license for source in sources]),
            seed=int(self.config.get("seed", 0)),
            commit=commit_hash(),
            numbers=numbers,
            training={
                "steps": self.step,
                "seconds": round(self.seconds),
                "hardware": hardware(),
                "config": json.loads(json.dumps(dict(self.config))),
            },
            **self.task.texts,
        )
        return save_weight(self.average, card, folder)

    def _log(self, values: Mapping[str, Any]) -> None:
        entry = {"step": self.step, "seconds": round(self.seconds, 1), **values}
        with (self.run / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def task_of(config: Mapping[str, Any], mixture: Mixture, held_out: Mixture | None) -> RestorationTask:
    """The task that a configuration names.

    Raises:
        LCTfoundError: there is none of that name.
    """
    torch.manual_seed(int(config.get("seed", 0)))  # of the network's first values
    if config["task"] == "sparse_view":
        from training.sparse_view import SparseViewTask

        return SparseViewTask(config, mixture, held_out)
    if config["task"] in ("post_processing", "dual_domain"):
        from training.sparse_view_baselines import DualDomainTask, PostProcessingTask

        baseline = PostProcessingTask if config["task"] == "post_processing" else DualDomainTask
        return baseline(config, mixture, held_out)
    if config["task"] == "low_dose":
        from training.low_dose import LowDoseTask

        return LowDoseTask(config, mixture, held_out)
    if config["task"] == "low_dose_cold":
        from training.low_dose_cold import ColdLowDoseTask

        return ColdLowDoseTask(config, mixture, held_out)
    raise LCTfoundError(f"There is no restoration task '{config['task']}'; see training/configs.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a net that restores images.")
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--shards", type=Source.parse, action="append", required=True, metavar="FOLDER[:SHARE]", help="may be repeated"
    )
    parser.add_argument("--held-out", type=Path, help="folder of shards to score on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoint and log")
    parser.add_argument("--start-from", type=Path, help="run, or folder of weights, to begin with")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="train nothing; write the weight")
    parser.add_argument("--version", default="1", help="of the exported weight")
    parser.add_argument("--numbers", type=Path, help="JSON file with measured results, for the card")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = tomllib.loads(options.config.read_text())
    try:
        mixture = Mixture(options.shards, int(config.get("seed", 0)))
        held_out = Mixture([Source(options.held_out)], 0) if options.held_out else None
        trainer = Trainer(config, task_of(config, mixture, held_out), options.out, mixture.data)
        if options.export:
            numbers = json.loads(options.numbers.read_text()) if options.numbers else {}
            card = trainer.export(options.export, options.version, numbers)
            parser.exit(0, f"{card.name}: {card.bytes / 1e6:.2f} MB, {card.license}, sha256 {card.sha256}\n")
        if options.start_from:
            trainer.start_from(options.start_from)
        trainer.fit(options.minutes * 60)
    except LCTfoundError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
