"""Reconstruction from few views, measured: every method on the same sinograms of the same slices.

    python -m training.evaluate.reconstruction --methods fbp,sirt,tv --views 8,16,32 --out output/reconstruction
    python -m training.evaluate.reconstruction --tune --methods fbp,sirt,tv --views 8,16,32

Sinograms are simulated from real CT slices (parallel beam, evenly spaced views over a half turn), by the projector
that the methods use as well, as the paper does: what a real scanner adds beside noise (scatter, beam hardening, a
finite focus) is not in them, and neither is the error of the projector's model.

Parameters of the methods are chosen on slices of training patients (``--tune``) by the RMSE, never on test slices, and
kept in ``reconstruction_parameters.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import platform
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import LCTfoundLib
from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.physics.geometry import ImageGrid, ParallelBeam
from LCTfoundLib.physics.hounsfield import attenuation_of
from LCTfoundLib.physics.noise import Dose, measure
from LCTfoundLib.physics.projector import Projector
from LCTfoundLib.physics.solvers import relative_residual
from LCTfoundLib.runtime.device import choose_device
from LCTfoundLib.runtime.files import atomic_path
from training.evaluate.cases import DEFAULT_DATA, MANIFEST
from training.evaluate.command import Log, command
from training.evaluate.image_metrics import FeatureDistance, rmse, score_slice
from training.evaluate.reconstruction_baselines import BASELINES
from training.evaluate.reconstruction_methods import (
    METHODS,
    Context,
    Method,
    Reconstructor,
    Setting,
    methods_named,
)
from training.evaluate.reconstruction_networks import weights_of
from training.evaluate.reconstruction_report import Row, Shown, write_report
from training.evaluate.reconstruction_slices import (
    SPLIT,
    ReconstructionSlice,
    SliceChoice,
    SliceWithMetal,
    read_slices,
)

__all__ = ["PARAMETERS", "evaluate", "main", "parameters_for", "simulated", "tune"]


#: Method, size, views and noise to the parameters chosen for them.
PARAMETERS = Path(__file__).parent / "reconstruction_parameters.json"
#: Slices of a picture sheet.
_SHOWN = 4


# -- a slice ---------------------------------------------------------------------------------------------------------


def simulated(piece: ReconstructionSlice, setting: Setting) -> tuple[Tensor, Projector]:
    """The sinogram (1, views, detectors) of a slice, the same at every call, and the projector that made it."""
    grid = ImageGrid(setting.size, setting.size, piece.pixel_mm)
    projector = Projector(grid, ParallelBeam.around(grid, setting.views))
    hu = torch.from_numpy(piece.hu)[None].to(setting.device)
    sinogram = projector.forward(attenuation_of(hu))
    if setting.dose is not None:
        # Drawn on the CPU, so that the noise is the same on every device.
        generator = torch.Generator().manual_seed(_seed(piece, setting))
        sinogram = measure(sinogram, setting.dose, generator)
    return sinogram, projector


def _seed(piece: ReconstructionSlice, setting: Setting) -> int:
    """Of a slice: another slice or number of views has another noise, another method the same."""
    return zlib.crc32(f"{piece.name} {setting.views} {setting.seed}".encode())


class _Measured:
    """One answer of one method, with its time."""

    def __init__(self, run: Reconstructor, sinogram: Tensor, projector: Projector, context: Context, name: str) -> None:
        _wait(sinogram.device)
        begin = time.perf_counter()
        answer = run(sinogram.clone(), projector, context)
        _wait(sinogram.device)
        self.seconds = time.perf_counter() - begin
        size = context.setting.size
        if answer.hu.shape != (1, size, size):
            raise ValueError(f"{name} answered {tuple(answer.hu.shape)} and not (1, {size}, {size})")
        self.residual = float(relative_residual(projector, attenuation_of(answer.hu.to(sinogram)), sinogram))
        self.hu = answer.hu[0].float().cpu().numpy()
        if not np.isfinite(self.hu).all():
            raise ValueError(f"{name} answered pixels that are not finite")
        self.evaluations = answer.evaluations
        self.interval_hu = None if answer.interval_hu is None else answer.interval_hu[0].float().cpu().numpy()

    def inside(self, piece: ReconstructionSlice) -> float | None:
        """Share of the body's pixels whose true value the interval holds; None where none was told."""
        if self.interval_hu is None:
            return None
        return float((np.abs(self.hu - piece.hu) <= self.interval_hu)[piece.body].mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def evaluate(
    slices: Sequence[ReconstructionSlice],
    methods: Sequence[Method],
    setting: Setting,
    parameters: Mapping[str, Mapping[str, Any]],
    feature_distance: FeatureDistance | None = None,
    log: Log = lambda line: None,
) -> tuple[list[Row], list[Shown]]:
    """All methods on all slices of a setting.

    Args:
        slices: to reconstruct.
        methods: by which.
        setting: size, views, noise.
        parameters: of the methods, by their names.
        feature_distance: measured as well if given.
        log: told after each slice.

    Returns:
        A row for each slice and method, and some slices with their reconstructions, for the pictures.

    Raises:
        ValueError: a method answered another shape, or pixels that are not finite.
    """
    ready = {method.name: method.make(setting) for method in methods}
    rows: list[Row] = []
    shown: list[Shown] = []
    picked = set(np.linspace(0, len(slices) - 1, min(_SHOWN, len(slices))).round().astype(int).tolist())
    for number, piece in enumerate(slices):
        sinogram, projector = simulated(piece, setting)
        images = {}
        for name, run in ready.items():
            context = Context(setting, parameters[name], _seed(piece, setting))
            found = _Measured(run, sinogram, projector, context, name)
            scores = score_slice(piece.hu, found.hu, piece.body, piece.pixel_mm, feature_distance)
            scores["residual"] = found.residual
            images[name] = found.hu
            rows.append(
                Row(
                    piece.name,
                    piece.patient,
                    setting.views,
                    name,
                    scores,
                    found.evaluations,
                    found.seconds,
                    found.inside(piece),
                )
            )
        if number in picked:
            shown.append(Shown(piece, images))
        told = ", ".join(f"{row.method} {row.scores['psnr']:.1f} dB" for row in rows[-len(ready) :])
        log(f"{setting.views} views, {piece.name}: {told}")
    return rows, shown


# -- parameters ------------------------------------------------------------------------------------------------------


def _key(method: Method, setting: Setting) -> str:
    return f"{method.name}, {setting.size} pixels, {setting.views} views, noise {setting.noise}"


def parameters_for(method: Method, setting: Setting, path: Path = PARAMETERS) -> dict[str, Any]:
    """What was chosen for a method in a setting; nothing for a method without parameters.

    Raises:
        LCTfoundError: nothing was chosen yet.
    """
    if not method.grid:
        return {}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    key = _key(method, setting)
    if key not in known:
        raise LCTfoundError(
            f"No parameters were chosen for '{key}'; choose them on training slices: the same command with --tune."
        )
    return known[key]["parameters"]


def tune(
    slices: Sequence[ReconstructionSlice], method: Method, setting: Setting, log: Log = lambda line: None
) -> dict[str, Any]:
    """Choose a method's parameters: the values of its grid with the least mean RMSE inside the body.

    Args:
        slices: of training patients.
        method: with a grid.
        setting: to choose for.
        log: told of each try, and of a choice at the end of its range.

    Returns:
        ``parameters``, the RMSE reached, and on which slices.
    """
    run = method.make(setting)
    tried: list[tuple[float, dict[str, Any]]] = []
    measured = [(piece, *simulated(piece, setting)) for piece in slices]
    for values in itertools.product(*method.grid.values()):
        parameters = dict(zip(method.grid, values, strict=True))
        errors = [
            rmse(
                piece.hu,
                _Measured(
                    run, sinogram, projector, Context(setting, parameters, _seed(piece, setting)), method.name
                ).hu,
                piece.body,
            )
            for piece, sinogram, projector in measured
        ]
        tried.append((float(np.mean(errors)), parameters))
        log(f"{_key(method, setting)}: {parameters} RMSE {tried[-1][0]:.2f} HU")
    error, best = min(tried, key=lambda pair: pair[0])
    for name in _at_the_end(method, best):
        log(f"{_key(method, setting)}: {name} is at the end of its range")
    return {"parameters": best, "rmse": round(error, 3), "slices": [piece.name for piece in slices]}


def _at_the_end(method: Method, chosen: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that lie at an end of what was tried: a better one may lie beyond."""
    for name, values in method.grid.items():
        ends = (values[0], values[-1])
        if len(values) > 2 and not isinstance(values[0], str) and chosen[name] in ends:
            yield name


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    merged = dict(sorted((known | dict(found)).items()))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


# -- the command -----------------------------------------------------------------------------------------------------


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reconstruction from few views, measured on real slices.")
    parser.add_argument(
        "--methods", default=",".join(BASELINES), help=f"of {', '.join(METHODS)}; the first is the one in question"
    )
    parser.add_argument("--views", type=_numbers, default=(8, 16, 32))
    parser.add_argument("--size", type=int, default=256, help="pixels of a side")
    parser.add_argument("--noise", choices=["none", "quantum"], default="none")
    parser.add_argument("--photons", type=float, default=Dose.photons, help="of a ray in air, with quantum noise")
    parser.add_argument(
        "--slices",
        type=SliceChoice,
        choices=[c for c in SliceChoice if c is not SliceChoice.TUNING],
        default=SliceChoice.TEST,
    )
    parser.add_argument("--metal", type=float, metavar="MM", help="radius of a titanium screw put into each slice")
    parser.add_argument("--tune", action="store_true", help="choose parameters on training slices instead")
    parser.add_argument("--parameters", type=Path, default=PARAMETERS, help="file of the chosen parameters")
    parser.add_argument("--no-feature-distance", action="store_true", help="leave the learned distance out")
    parser.add_argument("--weights", type=Path, help="folder of the networks' weights; the usual places otherwise")
    parser.add_argument(
        "--paper-steps", type=int, default=Setting.paper_steps, help="network evaluations of the method 'paper'"
    )
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/reconstruction"))
    parser.add_argument("--seed", type=int, default=0, help="of noise, of methods that draw, and of the bootstrap")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    options = parser.parse_args(arguments)
    above_0 = (min(options.views), options.photons, options.paper_steps, 1 if options.metal is None else options.metal)
    if not min(above_0) > 0 or options.size < 41:
        parser.error("--views, --photons, --paper-steps and --metal must be above 0, --size 41 at least")
    return options


class _Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.options, self.log = options, log
        self.methods = methods_named(options.methods.split(","))
        self.choice = choose_device(options.device)
        device = self.choice.device
        dose = Dose(options.photons) if options.noise == "quantum" else None
        self.settings = [
            Setting(options.size, views, dose, device, options.seed, options.weights, options.paper_steps)
            for views in options.views
        ]

    def slices(self, choice: SliceChoice) -> tuple[list[ReconstructionSlice], list[str]]:
        found, missing = read_slices(choice, self.options.size, self.options.data)
        for reason in missing:
            self.log(f"left out: {reason}")
        if not found:
            raise LCTfoundError(f"There is no slice to work on ({'; '.join(missing)}).")
        if self.options.metal is not None:
            found = [SliceWithMetal.of(piece, self.options.metal) for piece in found]
        return found, missing

    def tune(self) -> None:
        slices, _ = self.slices(SliceChoice.TUNING)
        for setting in self.settings:
            for method in self.methods:
                if method.grid:
                    chosen = tune(slices, method, setting, self.log)
                    _keep(self.options.parameters, {_key(method, setting): chosen})
                    self.log(f"{_key(method, setting)}: chosen {chosen['parameters']}")

    def evaluate(self) -> str:
        options = self.options
        parameters = [
            {method.name: parameters_for(method, setting, options.parameters) for method in self.methods}
            for setting in self.settings
        ]
        slices, missing = self.slices(options.slices)
        distance = None if options.no_feature_distance else FeatureDistance(self.choice)
        rows: list[Row] = []
        shown: dict[int, list[Shown]] = {}
        for setting, chosen in zip(self.settings, parameters, strict=True):
            found, pictures = evaluate(slices, self.methods, setting, chosen, distance, self.log)
            rows += found
            shown[setting.views] = pictures
        return write_report(options.out, rows, self.methods, shown, self._told(parameters, distance), missing)

    def _told(self, parameters: Sequence[Mapping[str, Any]], distance: FeatureDistance | None) -> dict[str, Any]:
        options = self.options
        return {
            "version": LCTfoundLib.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "device": self.choice.name,
            "threads": torch.get_num_threads(),
            "split_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (SPLIT, MANIFEST)},
            "feature_distance_weight_sha256": None if distance is None else distance.net.sha256,
            "slices": str(options.slices),
            "size": options.size,
            "views": list(options.views),
            "noise": self.settings[0].noise,
            "metal": None if options.metal is None else f"titanium screw, radius {options.metal:g} mm, one energy",
            "geometry": "parallel beam, evenly spaced views over a half turn, channels as wide as pixels",
            "parameters": {
                str(setting.views): dict(chosen) for setting, chosen in zip(self.settings, parameters, strict=True)
            },
            "weights_sha256": weights_of(self.methods, options.weights),
            "seed": options.seed,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        run = _Run(options, log)
        if options.tune:
            run.tune()
            log(f"written to {options.parameters}")
            return
        print(run.evaluate())
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
