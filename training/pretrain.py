"""Pretrain the diffusion backbone from shards, on one process or many nodes.

    python -m training.pretrain training/configs/student.toml --shards runs/shards/phantom:0.65 \
        --shards runs/shards/real:0.35 --out runs/student
    torchrun --nproc-per-node 8 -m training.pretrain training/configs/paper.toml ...     (DDP; add --fsdp to shard)
    sbatch training/cluster/pretrain.slurm                                               (several nodes)

Starting the same command again resumes from the last whole checkpoint, bit for bit on a CPU: weights, EMA, optimizer
and the place in the data. A run folder holds ``checkpoints/``, ``tensorboard/``, ``log.jsonl`` and ``report.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from LCTfoundLib.case import peak_memory_mb
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.backbone import backbone_config, build_backbone, parameter_count
from LCTfoundLib.networks.conditions import LUNG, MEDIASTINUM, BertEncoder, BuiltInEncoder, Condition, ConditionEncoder
from LCTfoundLib.networks.features import NoiseSchedule, Prediction
from LCTfoundLib.networks.foundation import InputRecipe
from LCTfoundLib.networks.sampling import Sampler, denoise
from LCTfoundLib.runtime.files import output_errors
from training.pretext import Pretext, PretextSample, masked_input, pretext_loss
from training.segmentation import StopOnSignal, hardware
from training.shard_stream import Augmentation, Mixture, Sample, ShardError, SliceSampler, SmallSlices, Source

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Batch", "Pretrainer", "Told", "averaged_weights", "main", "newest_checkpoint"]

#: Besides those whose step is a multiple of the configuration's ``keep_every``.
_KEPT_CHECKPOINTS = 2
_EMA_FILE = "ema.pt"
_log = logging.getLogger(__name__)


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples with what is done to them; all tensors float32 (N, 3, H, W) unless said.

    Attributes:
        images, noise: see ``Sample`` and ``PretextSample``.
        mask: bool.
        timesteps, kinds: int64 (N,).
        conditions: N.
    """

    images: Tensor
    noise: Tensor
    mask: Tensor
    timesteps: Tensor
    kinds: Tensor
    conditions: list[Condition]

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sample, PretextSample]]) -> Batch:
        samples, tasks = zip(*pairs, strict=True)
        return cls(
            torch.stack([sample.image for sample in samples]),
            torch.stack([task.noise for task in tasks]),
            torch.stack([task.mask for task in tasks]),
            torch.tensor([task.timestep for task in tasks]),
            torch.tensor([int(task.kind) for task in tasks]),
            [sample.condition for sample in samples],
        )

    def to(self, device: torch.device) -> Batch:
        tensors = (self.images, self.noise, self.mask, self.timesteps, self.kinds)
        moved = [tensor.to(device, non_blocking=True) for tensor in tensors]
        return Batch(*moved, self.conditions)


class _Samples(torch.utils.data.Dataset[tuple[Sample, PretextSample]]):
    """By number: pure functions, so that nothing of the loading needs to be saved."""

    def __init__(self, sampler: SliceSampler, pretext: Pretext) -> None:
        self.sampler, self.pretext = sampler, pretext

    def __getitem__(self, number: int) -> tuple[Sample, PretextSample]:
        sample = self.sampler(number)
        channels, height, width = sample.image.shape
        return sample, self.pretext.draw((channels, height, width), (self.sampler.seed, number), sample.most_noise)


class _Numbers:
    """The numbers of each micro-batch of one process from a step on.

    A step always takes the same numbers, however many processes and micro-batches share it.
    """

    def __init__(self, step: int, micro: int, batch: int, rank: int, world: int) -> None:
        self._first, self._batch, self._rank, self._world = step * micro, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        turn = self._first
        while True:
            start = (turn * self._world + self._rank) * self._batch
            yield list(range(start, start + self._batch))
            turn += 1


# -- the model ---------------------------------------------------------------------------------------------------------


class Told(nn.Module):
    """A backbone with its trainable condition encoder: one module for DDP, FSDP and the optimizer.

    With a language model the encoder is frozen and lies outside; embeddings are then given in place of conditions.
    """

    def __init__(self, network: nn.Module, encoder: BuiltInEncoder | None) -> None:
        super().__init__()
        self.network, self.encoder = network, encoder

    def forward(self, images: Tensor, timesteps: Tensor, told: list[Condition] | Tensor) -> Tensor:
        """Predicted noise, (N, 3, H, W)."""
        if not isinstance(told, Tensor):
            assert self.encoder is not None
            # Every parameter takes part in every step, as DDP expects, also where no sample of the batch needs it.
            idle = 0.0 * sum(parameter.sum() for parameter in self.encoder.parameters())
            told = self.encoder(told) + idle
        return self.network(images, timesteps, told, return_dict=False)[0]


class Pretrainer:
    """One run of one configuration.

    Args:
        config: the parsed TOML file.
        sources: of the shards.
        run: its folder.
        validation: shards of a fixed set of samples to score; None scores nothing.
        language_model: of the conditions; None trains the built-in encoder.
        fsdp: shard parameters, gradients and optimizer over the processes.
        workers: processes that read and augment.

    Raises:
        ShardError: a source holds no shards, or damaged ones.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        sources: Sequence[Source],
        run: Path,
        validation: Path | None = None,
        language_model: Path | None = None,
        fsdp: bool = False,
        workers: int = 0,
    ) -> None:
        self.config, self.run = config, run
        settings = config["optimizer"]
        self.micro, self.batch = int(settings.get("accumulate", 1)), int(settings["batch"])
        self.seed = int(config.get("seed", 0))
        self.accelerator = _accelerator(str(config.get("precision", "bf16")), self.micro, fsdp)
        self.device = self.accelerator.device
        run.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.seed)
        self.recipe = InputRecipe.from_dict(config["input"])
        self.network_config = backbone_config(config["preset"], **_tuples(config.get("network", {})))
        self._frozen: ConditionEncoder | None = BertEncoder(language_model) if language_model else None
        told = Told(build_backbone(self.network_config), None if language_model else BuiltInEncoder())
        if not fsdp:  # which shards no weights of another layout
            told.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            told.parameters(), lr=settings["lr"], weight_decay=settings.get("weight_decay", 0.01)
        )
        self.model, self.optimizer = self.accelerator.prepare(told.train(), optimizer)
        self.ema = _ema(self.model, float(settings.get("ema", 0.9999)))
        self.schedule = NoiseSchedule()
        self.prediction = Prediction(config.get("prediction", Prediction.EPSILON))
        pretext = Pretext.from_dict(config.get("pretext", {}))
        augmentation = Augmentation(**_tuples(config["augmentation"]))
        self.mixture = Mixture(sources, self.seed)
        small = SmallSlices(batch=self.batch, **config["small"]) if "small" in config else None
        sampler = SliceSampler(
            self.mixture, augmentation, self.recipe, self.seed, windows=config.get("windows"), small=small
        )
        self._samples = _Samples(sampler, pretext)
        self._validation = _validation_batches(validation, augmentation, self.recipe) if validation else []
        self._workers = workers
        self.step, self.seconds, self._waited = 0, 0.0, 0.0
        #: The run whose weights this one began with: its steps, their size, and what it had begun with itself.
        self.begun_from: dict[str, Any] | None = None
        self._resume()

    @property
    def parameters(self) -> int:
        """Number of trained values of the whole model."""
        return parameter_count(build_backbone(self.network_config, "meta"))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(
        self,
        max_seconds: float = math.inf,
        last_step: int | None = None,
        save_every: int = 0,
        sample_every: int = 0,
        validate_every: int = 0,
        log_every: int = 10,
    ) -> None:
        """Train to the configured step, or until the time is up or a signal asks to stop; then save.

        Args:
            max_seconds: of this call.
            last_step: to stop at before the configuration's last; the rate's course stays that of the configuration.
            save_every: steps between checkpoints; 0: every 5 minutes.
            sample_every: steps between grids of samples; 0: none.
            validate_every: steps between scores; 0: none.
            log_every: steps between entries of the log.
        """
        stop, begin = StopOnSignal(), time.monotonic()
        total = min(int(self.config["optimizer"]["steps"]), sys.maxsize if last_step is None else last_step)
        last_save, losses = begin, []
        batches = iter(self._loader())
        with _Board(self.run / "tensorboard", self.accelerator.is_main_process) as board:
            while self.step < total and not self._is_over(stop, begin, max_seconds):
                tick = time.monotonic()
                losses.append(self._train_step(batches))
                self.step += 1
                self.seconds += time.monotonic() - tick
                if self.step % log_every == 0:
                    self._report_step(board, losses)
                    losses = []
                if sample_every and self.step % sample_every == 0:
                    self._show(board)
                if validate_every and self.step % validate_every == 0:
                    self._validate(board)
                due = self.step % save_every == 0 if save_every else time.monotonic() - last_save > 300
                if self.accelerator.num_processes > 1 and not save_every:
                    due = self.step % 1000 == 0  # clocks differ between processes; all have to save at one step
                if due:
                    self.save()
                    last_save = time.monotonic()
            self.save()
            if self._validation:
                self._validate(board)
        self._write_report()

    def _is_over(self, stop: StopOnSignal, begin: float, max_seconds: float) -> bool:
        over = stop.requested or time.monotonic() - begin > max_seconds
        if self.accelerator.num_processes == 1:
            return over
        told = torch.tensor(float(over), device=self.device)  # one process' clock or signal stops all at one step
        return bool(self.accelerator.reduce(told, "sum") > 0)

    def _loader(self) -> torch.utils.data.DataLoader[Any]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        numbers = _Numbers(self.step, self.micro, self.batch, rank, world)
        return torch.utils.data.DataLoader(
            self._samples,
            batch_sampler=numbers,  # type: ignore[arg-type]
            collate_fn=Batch.of,
            num_workers=self._workers,
            prefetch_factor=4 if self._workers else None,
        )

    def _train_step(self, batches: Iterator[Batch]) -> float:
        settings = self.config["optimizer"]
        for group in self.optimizer.param_groups:
            group["lr"] = settings["lr"] * self.rate(self.step)
        total = 0.0
        for _ in range(self.micro):
            tick = time.monotonic()
            batch = next(batches).to(self.device)
            self._waited += time.monotonic() - tick
            with self.accelerator.accumulate(self.model):
                loss = self._losses(batch).mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), settings.get("clip", 1.0))
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach())
        self.ema.step(self.model.parameters())
        return total / self.micro

    def rate(self, step: int) -> float:
        """The learning rate's factor: linear warm-up, the full rate, a cosine to 0; a function of the step alone.

        ``hold`` is the share of the steps after which the cosine begins; without it, as published, after the warm-up.
        """
        settings = self.config["optimizer"]
        warmup, total = int(settings["warmup"]), int(settings["steps"])
        if step < warmup:
            return (step + 1) / warmup
        begin = max(warmup, round(float(settings.get("hold", 0.0)) * total))
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - begin) / max(total - begin, 1))))

    def _losses(self, batch: Batch, of_noise: bool = False) -> Tensor:
        """Loss of each sample, (N,); ``of_noise`` measures every model by the noise it predicts."""
        told: list[Condition] | Tensor = batch.conditions
        if self._frozen is not None:
            told = self._frozen.encode(batch.conditions).to(self.device)
        shown, target, weight = masked_input(
            batch.images, batch.noise, batch.timesteps, batch.mask, batch.kinds, self.schedule, self.prediction
        )
        shown = shown.contiguous(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            answer = self.model(shown, batch.timesteps, told)
        if of_noise:
            answer = self.schedule.noise_in(shown, answer.float(), batch.timesteps, self.prediction)
            target = batch.noise
        return pretext_loss(answer, target, weight)

    # -- what it tells -------------------------------------------------------------------------------------------------

    def _report_step(self, board: _Board, losses: list[float]) -> None:
        loss = torch.tensor(sum(losses) / len(losses), device=self.device)
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        values = {
            "loss": float(loss),
            "lr": float(self.config["optimizer"]["lr"]) * self.rate(self.step - 1),
            "slices_per_second": self._throughput(),
        }
        board.scalars(values, self.step)
        self._append(values)

    def _throughput(self) -> float:
        done = self.step - self._first_step
        seconds = self.seconds - self._first_seconds
        return done * self.micro * self.batch * self.accelerator.num_processes / max(seconds, 1e-9)

    @torch.no_grad()
    def _validate(self, board: _Board) -> None:
        """Noise prediction of the EMA weights on fixed samples and timesteps: the number that all pretexts share."""
        with self._averaged():
            losses = torch.cat([self._losses(batch.to(self.device), of_noise=True) for batch in self._validation])
        values = {"validation_loss": float(losses.mean())}
        board.scalars(values, self.step)
        self._append(values)

    @torch.no_grad()
    def _show(self, board: _Board, steps: int = 20) -> None:
        """A grid of images that the EMA weights draw, both windows, from fixed noise."""
        sampler = self._samples.sampler
        size = sampler.small.size if sampler.small else sampler.augmentation.size
        conditions = [Condition(window) for window in (LUNG, LUNG, MEDIASTINUM, MEDIASTINUM)]
        told: list[Condition] | Tensor = conditions
        if self._frozen is not None:
            told = self._frozen.encode(conditions).to(self.device)

        def predict(noisy: Tensor, step: int) -> Tensor:
            timesteps = torch.full((len(noisy),), step, device=self.device)
            with self.accelerator.autocast():
                answer = self.model(noisy.contiguous(memory_format=torch.channels_last), timesteps, told)
            return self.schedule.noise_in(noisy, answer.float(), timesteps, self.prediction)

        noise = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        with self._averaged():
            images = denoise(predict, noise, Sampler.DPM_SOLVER, steps)
        board.images("samples", (images[:, 1:2] + 1) / 2, self.step)

    def _averaged(self) -> _Averaged:
        return _Averaged(self.ema, self.model)

    def _append(self, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.run / "log.jsonl").open("a") as file:
                entry = {"step": self.step, "seconds": round(self.seconds, 1), **values}
                file.write(json.dumps(entry) + "\n")

    def _write_report(self) -> None:
        """Throughput and memory of this call."""
        cuda = self.device.type == "cuda"
        report = {
            "step": self.step,
            "seconds_in_all": round(self.seconds, 1),
            "slices_per_second": round(self._throughput(), 3),
            "share_of_time_waiting_for_data": round(self._waited / max(self.seconds - self._first_seconds, 1e-9), 4),
            "processes": self.accelerator.num_processes,
            "slices_per_step": self.micro * self.batch * self.accelerator.num_processes,
            "parameters": self.parameters,
            "peak_memory_mb": round(peak_memory_mb()),
            "peak_gpu_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
            "hardware": hardware(),
            "precision": self.accelerator.mixed_precision,
        }
        if self.accelerator.is_main_process:
            (self.run / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint under a hidden name and rename it when it is whole; older ones go, but for one.

        Raises:
            OutputError: the disk is full or cannot be written; the last checkpoint stays.
        """
        folder = self.run / "checkpoints"
        target, staging = folder / f"step-{self.step:08d}", folder / f".step-{self.step:08d}"
        if target.exists():
            return target
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while it saved
            with output_errors(self.run):
                staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        averaged = self.ema.state_dict() | {"shadow_params": [_whole(value) for value in self.ema.shadow_params]}
        with output_errors(self.run):
            self.accelerator.save_state(str(staging))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            told = {"step": self.step, "seconds": self.seconds, "config": _plain(self.config)}
            told |= {"data": self.mixture.data, "processes": self.accelerator.num_processes}
            told |= {"begun_from": self.begun_from}
            with output_errors(self.run):
                torch.save(averaged, staging / _EMA_FILE)
                (staging / "progress.json").write_text(json.dumps(told, indent=2))
                _flush(staging)
                staging.rename(target)
            keep = int(self.config.get("keep_every", 0))
            for old in sorted(folder.glob("step-*"))[:-_KEPT_CHECKPOINTS]:
                if not keep or _step_of(old) % keep:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return target

    def _resume(self) -> None:
        checkpoint = newest_checkpoint(self.run)
        if checkpoint is not None:
            told = json.loads((checkpoint / "progress.json").read_text())
            if told["config"]["optimizer"]["batch"] != self.batch or told["config"]["preset"] != self.config["preset"]:
                raise ShardError(f"{self.run} holds a run of another configuration; give another --out.")
            self.accelerator.load_state(str(checkpoint))
            state = torch.load(checkpoint / _EMA_FILE, map_location="cpu", weights_only=True)
            shadows = zip(state["shadow_params"], self.ema.shadow_params, strict=True)
            self.ema.load_state_dict(state | {"shadow_params": [_like(value, shadow) for value, shadow in shadows]})
            self.ema.to(self.device)
            self.step, self.seconds = int(told["step"]), float(told["seconds"])
            self.begun_from = told.get("begun_from")
            _log.info("resumed at step %d", self.step)
        self._first_step, self._first_seconds = self.step, self.seconds

    def start_from(self, run: Path) -> None:
        """Begin with the averaged weights of another run; a run that has begun keeps its own.

        Raises:
            ShardError: that run has no checkpoint.
        """
        if self.step:
            return
        checkpoint = newest_checkpoint(run)
        if checkpoint is None:
            raise ShardError(f"{run} holds no checkpoint to begin with; check the path.")
        state = torch.load(checkpoint / _EMA_FILE, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), state["shadow_params"], strict=True):
                parameter.copy_(_like(value, parameter))
        self.ema = _ema(self.model, float(self.config["optimizer"].get("ema", 0.9999)))
        told = json.loads((checkpoint / "progress.json").read_text())
        optimizer = told["config"]["optimizer"]
        self.begun_from = {key: told.get(key) for key in ("step", "seconds", "data", "begun_from")} | {
            "slices_per_step": optimizer["batch"] * optimizer.get("accumulate", 1) * told["processes"]
        }


def newest_checkpoint(run: Path) -> Path | None:
    """The last whole checkpoint of a run."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class _Averaged:
    """The EMA's values in the model while the block runs."""

    def __init__(self, ema: Any, model: nn.Module) -> None:
        self._ema, self._model = ema, model

    def __enter__(self) -> None:
        self._ema.store(self._model.parameters())
        self._ema.copy_to(self._model.parameters())
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._ema.restore(self._model.parameters())
        self._model.train()


class _Board:
    """TensorBoard of the main process; the others write nothing."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self._folder, self._is_main = folder, is_main
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> _Board:
        if self._is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def images(self, name: str, images: Tensor, step: int) -> None:
        if self._writer is not None:
            self._writer.add_images(name, images.cpu(), step)


def _accelerator(precision: str, micro: int, fsdp: bool) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT") if fsdp else None
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=micro,
        fsdp_plugin=plugin,
        cpu=not torch.cuda.is_available(),
    )
    if fsdp and accelerator.distributed_type is not DistributedType.FSDP:
        raise LCTfoundError("Sharding a model needs several GPUs, one process each; leave --fsdp out.")
    return accelerator


def _ema(model: nn.Module, decay: float) -> Any:
    """Averaged weights; the decay warms up, so that a short run's average is not its beginning."""
    from diffusers.training_utils import EMAModel

    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def _whole(value: Tensor) -> Tensor:
    """Of a tensor that FSDP has shared out among the processes; all of them have to ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor shared out as another is."""
    value = value.to(model.device)
    if not hasattr(model, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, model.device_mesh, model.placements)


def averaged_weights(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The EMA of a checkpoint: the network's tensors, and those of its built-in condition encoder (if it has one)."""
    config = json.loads((checkpoint / "progress.json").read_text())["config"]
    network = build_backbone(backbone_config(config["preset"], **_tuples(config.get("network", {}))), "meta")
    values = torch.load(checkpoint / _EMA_FILE, map_location="cpu", weights_only=True)["shadow_params"]
    built_in = len(values) > len(list(network.parameters()))
    names = [name for name, _ in Told(network, BuiltInEncoder() if built_in else None).named_parameters()]
    named = dict(zip(names, values, strict=True))

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

    return part("network."), part("encoder.")


def _validation_batches(folder: Path, augmentation: Augmentation, recipe: InputRecipe) -> list[Batch]:
    """64 samples at evenly spread timesteps, noise prediction only."""
    sampler = SliceSampler(Mixture([Source(folder)], 0), augmentation, recipe, seed=9_999_999, drop=False)
    samples = _Samples(sampler, Pretext())
    pairs = [samples[number] for number in range(64)]
    for number, (_, task) in enumerate(pairs):
        task.timestep = int((number + 0.5) * NoiseSchedule.steps / len(pairs))
    return [Batch.of(pairs[start : start + 8]) for start in range(0, len(pairs), 8)]


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config))


def _flush(folder: Path) -> None:
    """To the disk for good: a rename may outlive the data it names when the power fails."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the diffusion backbone.")
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--shards", type=Source.parse, action="append", required=True, metavar="FOLDER[:SHARE]", help="may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoints, log and report")
    parser.add_argument("--validation", type=Path, help="folder of held-out shards")
    parser.add_argument("--language-model", type=Path, help="folder of a BERT base model, for the published conditions")
    parser.add_argument("--start-from", type=Path, help="run whose averaged weights to begin with")
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the processes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="save and stop after this time")
    parser.add_argument("--last-step", type=int, help="save and stop at this step")
    parser.add_argument("--save-every", type=int, default=0, help="steps; default: every 5 minutes")
    parser.add_argument("--sample-every", type=int, default=0, help="steps; default: no sample grids")
    parser.add_argument("--validate-every", type=int, default=0, help="steps; default: at the end only")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and augment")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--is-done", action="store_true", help="train nothing; exit with 0 if the last step is reached")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.threads:
        torch.set_num_threads(options.threads)
    config = tomllib.loads(options.config.read_text())
    if options.is_done:
        checkpoint = newest_checkpoint(options.out)
        done = checkpoint is not None and _step_of(checkpoint) >= int(config["optimizer"]["steps"])
        parser.exit(0 if done else 1)
    try:
        trainer = Pretrainer(
            config,
            options.shards,
            options.out,
            options.validation,
            options.language_model,
            options.fsdp,
            options.workers,
        )
        if options.start_from:
            trainer.start_from(options.start_from)
        trainer.fit(
            options.minutes * 60,
            options.last_step,
            options.save_every,
            options.sample_every,
            options.validate_every,
        )
    except LCTfoundError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
