"""Train a segmentation net from a pool of phantom samples.

    python -m training.segmentation training/configs/coarse.toml --pool runs/pool/coarse --run runs/coarse

Runs on one GPU, on several (``accelerate launch -m training.segmentation ...``) or on the CPU (bfloat16).
A run folder holds the last checkpoint, a log (``log.jsonl``) and the exported EMA weight; starting the same command
again resumes where the run was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LCTfoundLib.networks.unet3d import UNet3D, UNet3DConfig
from training.losses import IGNORE, HeadTarget, head_loss
from training.samples import Pool, SampleDataset, load_sample

__all__ = ["Trainer", "main"]


class Trainer:
    """One training run of one config.

    Args:
        config: the parsed TOML file.
        pool: training samples.
        run: folder of checkpoint, log and exported weight.
        validation: held-out samples; scored every ``validate_every`` steps.
    """

    def __init__(self, config: dict[str, Any], pool: Pool, run: Path, validation: Pool | None = None) -> None:
        self.config, self.run, self.validation = config, run, validation
        run.mkdir(parents=True, exist_ok=True)
        self.accelerator = _accelerator()
        self.device = (
            self.accelerator.device
            if self.accelerator
            else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        )
        torch.manual_seed(int(config.get("seed", 0)))
        self.network = UNet3D(UNet3DConfig.from_dict(config["network"])).to(
            self.device, memory_format=torch.channels_last_3d
        )
        settings = config["optimizer"]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"]
        )
        self.ema = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.step, self.best, self.seconds = 0, -1.0, 0.0
        self._resume()
        self.model: nn.Module = self.network
        if self.accelerator:
            self.model, self.optimizer = self.accelerator.prepare(self.network, self.optimizer)
        self.patch = tuple(config["patch"])
        rank = self.accelerator.process_index if self.accelerator else 0
        seed = 100_000 * int(config.get("seed", 0)) + 1_000 * rank + self.step
        self.dataset = SampleDataset(pool, self.patch, seed)  # type: ignore[arg-type]

    def start_from(self, weights: Path) -> None:
        """Begin with a shipped weight of the same name; a run that has begun keeps its own."""
        if self.step:
            return
        from LCTfoundLib.weights.registry import load_weight  # needs safetensors, which a bare trainer does not

        _, state = load_weight(self.config["name"], weights)
        self.network.load_state_dict(state, strict=False)  # the auxiliary heads are not shipped
        self.ema = {key: value.detach().clone() for key, value in self.network.state_dict().items()}

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(
        self, max_seconds: float = math.inf, workers: int = 0, log_every: int = 10, validate_every: int = 200
    ) -> None:
        """Train until the configured steps or ``max_seconds`` of this call, whichever is first."""
        stop = StopOnSignal()
        batches = self._batches(workers)
        total, begin, window = int(self.config["optimizer"]["steps"]), time.monotonic(), []
        last_save = begin
        while self.step < total and time.monotonic() - begin < max_seconds and not stop.requested:
            tick = time.monotonic()
            window.append(self._train_step(next(batches), self._lr_factor(total, begin, max_seconds)))
            self.seconds += time.monotonic() - tick
            self.step += 1
            if self.step % log_every == 0:
                self._log({"loss": sum(window) / len(window), "seconds_per_step": (time.monotonic() - tick)})
                window.clear()
            if self.validation and self.step % validate_every == 0:
                self._validate()
            if time.monotonic() - last_save > 120:
                self.save()
                last_save = time.monotonic()
        if self.validation and self.validation.files():
            self._validate()
        self.save()

    def _batches(self, workers: int) -> Iterator[dict[str, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_size=int(self.config["optimizer"]["batch"]),
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
        )
        return iter(loader)

    def _lr_factor(self, total: int, begin: float, max_seconds: float) -> float:
        """Warm-up, then cosine over the steps, or over the time given when that ends first."""
        warmup = int(self.config["optimizer"]["warmup_steps"])
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = self.step / total
        if math.isfinite(max_seconds):
            progress = max(progress, min(1.0, (time.monotonic() - begin) / max_seconds))
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))

    def _train_step(self, batch: dict[str, Tensor], lr_factor: float) -> float:
        settings = self.config["optimizer"]
        for group in self.optimizer.param_groups:
            group["lr"] = settings["lr"] * lr_factor
        self.model.train()
        loss = self._loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator:
            self.accelerator.backward(loss)
        else:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings["clip"])
        if torch.isfinite(norm):  # a rare overflow must not poison the weights
            self.optimizer.step()
            self._update_ema(min(settings["ema"], (1 + self.step) / (10 + self.step)))
        return float(loss.detach())

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        images = batch["input"].to(self.device, memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.model(images)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        levels = [0, *self.network.config.auxiliary][: len(outputs)]
        loss = torch.zeros((), device=self.device)
        options = self.config["loss"]
        for output, level in zip(outputs, levels, strict=True):
            for name, logits in zip(self.config["heads"], self.network.split(output), strict=True):
                target = self._target(batch, name)
                if level:
                    target = target.strided(2**level)
                tree_cost = options["tree_cost"] if name == "trees" else 1.0
                loss = loss + 0.5**level * head_loss(logits, target, options["skeleton_weight"], tree_cost)
        return loss

    def _target(self, batch: dict[str, Tensor], name: str) -> HeadTarget:
        skeleton = batch["skeleton"].to(self.device) if name == "trees" else None
        return HeadTarget(batch[name].to(self.device), skeleton)

    @torch.no_grad()
    def _update_ema(self, decay: float) -> None:
        for key, value in self.network.state_dict().items():
            if value.dtype.is_floating_point:
                self.ema[key].lerp_(value, 1 - decay)
            else:
                self.ema[key].copy_(value)

    # -- validation, checkpoints, export -----------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean Dice per head of the EMA weights over the validation pool; the best is exported."""
        assert self.validation is not None
        kept = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.ema)
        self.network.eval()
        dataset = SampleDataset(self.validation, self.patch, 0, augment=False)  # type: ignore[arg-type]
        scores: dict[str, list[Tensor]] = {name: [] for name in self.config["heads"]}
        for path in self.validation.files():
            item = dataset.item(load_sample(path), random.Random(0))
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.network(item["input"][None].to(self.device, memory_format=torch.channels_last_3d))
            for name, part in zip(self.config["heads"], self.network.split(logits), strict=True):
                scores[name].append(_dice(part[0].float().argmax(0), item[name].to(self.device), part.shape[1]))
        self.network.load_state_dict(kept)
        table = {name: torch.stack(values).nanmean(0).tolist() for name, values in scores.items()}
        means = {f"dice_{name}": float(torch.tensor(v)[1:].nanmean()) for name, v in table.items()}
        self._log({**means, "dice": table})
        score = sum(means.values()) / len(means)
        if score > self.best:
            self.best = score
            torch.save(self.ema, self.run / "best.pt")

    def save(self) -> None:
        """Write the checkpoint atomically (weights, EMA, optimizer, step)."""
        if self.accelerator and not self.accelerator.is_main_process:
            return
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
        }
        temporary = self.run / "checkpoint.pt.tmp"
        torch.save(state, temporary)
        temporary.replace(self.run / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.run / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.ema = state["ema"]
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        if state.get("optimizer"):
            self.optimizer.load_state_dict(state["optimizer"])

    def _log(self, values: dict[str, Any]) -> None:
        if self.accelerator and not self.accelerator.is_main_process:
            return
        with (self.run / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "training_seconds": round(self.seconds, 1), **values}) + "\n")


def _dice(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Dice per class, NaN where the class is absent from both."""
    known = labels != IGNORE
    p, t = prediction[known].long(), labels[known].long()
    both = torch.bincount(t[p == t], minlength=classes).float()
    total = torch.bincount(p, minlength=classes) + torch.bincount(t, minlength=classes)
    return torch.where(total > 0, 2 * both / total.clamp(min=1), torch.nan)


class StopOnSignal:
    """Turns SIGTERM/SIGINT into a flag so that a stopped run saves its checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def _accelerator():  # type: ignore[no-untyped-def]
    """accelerate's Accelerator when launched with several processes, else None (then accelerate is not needed)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator(mixed_precision="bf16")


def commit_hash() -> str:
    """The commit that trains, for the weight's card."""
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return run.stdout.strip() or "unknown"


def hardware() -> str:
    """What trains, for the weight's card."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a segmentation net.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--pool", type=Path, required=True, help="folder that training.generate fills")
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--validation", type=Path, help="pool of held-out samples")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop (and anneal the rate) after this time")
    parser.add_argument("--start-from", type=Path, help="folder of a shipped weight to begin with")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = tomllib.loads(options.config.read_text())
    validation = Pool(options.validation) if options.validation else None
    trainer = Trainer(config, Pool(options.pool), options.run, validation)
    if options.start_from:
        trainer.start_from(options.start_from)
    trainer.fit(options.minutes * 60, options.workers)


if __name__ == "__main__":
    main()
