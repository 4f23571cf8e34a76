"""Is the pretraining of the foundation model worth having? Generated slices and frozen features, measured.

    python -m training.evaluate.foundation --weights runs/foundation --models backbone_student,mae_student \\
        --samples runs/samples --data ../shared/data --out output/foundation

1. Kernel distance of generated slices to real ones, beside that between real halves and of phantoms.
2. Linear probes on frozen features, against the same network before training, and against every other model named:
   contrast medium or not on TCGA-LUAD slices, and the lobe of each pixel with the labels of 1, 3 and 6 phantoms.

The first model is the one in question. What is cached in the output folder is used again; delete it to compute anew.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import LCTfoundLib
from LCTfoundLib.anatomy.structures import Lobe
from LCTfoundLib.networks.conditions import WINDOWS
from LCTfoundLib.networks.foundation import FoundationModel, load_foundation
from LCTfoundLib.runtime.device import DeviceChoice, choose_device
from training.distill_features import load_distilled
from training.evaluate.cases import DEFAULT_DATA, MANIFEST, seeds
from training.evaluate.command import Log, command
from training.evaluate.foundation_features import (
    BackboneFeatures,
    FeatureSettings,
    GrayFeatures,
    OnePassFeatures,
    SliceFeatures,
    cached,
    lattice,
    random_model,
)
from training.evaluate.foundation_report import (
    ContrastResult,
    KernelRow,
    PixelPicture,
    PixelResult,
    write_report,
)
from training.evaluate.foundation_slices import (
    IGNORE,
    TRAIN_SEED,
    Labels,
    SliceSet,
    joined,
    kept,
    labeled_phantom,
    labeled_real,
    read_samples,
    slices_of_volumes,
    tcga_slices,
)
from training.evaluate.kernel_distance import FixedNet, Level, between_halves, kernel_distance, standardized
from training.evaluate.metrics import dice, dice_per_label
from training.evaluate.probes import DRAWS, PixelProbe, cross_validated, score_classifier
from training.evaluate.statistics import mean_over_seeds

__all__ = [
    "LOBES",
    "LUNGS",
    "RANDOM",
    "Method",
    "contrast_probe",
    "kernel_rows",
    "main",
    "pixel_probe",
    "training_groups",
]


RANDOM = "random initialization"
#: Scores of the pixel probe.
LOBES, LUNGS = "lobes, mean Dice", "lungs, Dice"
#: Slices of one test patient and of one training patient.
_TEST_SLICES, _TRAIN_SLICES = 3, 8
_REAL_SLICES = 8
#: Of each real volume, for the kernel distance.
_VOLUME_SLICES = 10
_PIXELS_PER_SLICE = 400
#: Choices of few training patients that are tried; their mean is reported.
_MOST_GROUPS = 3


@dataclass(frozen=True)
class Method:
    """What is compared: one model, or several that differ in their seed and count as one."""

    name: str
    members: tuple[SliceFeatures, ...]


# -- generated slices ------------------------------------------------------------------------------------------------


def kernel_rows(
    features: dict[str, np.ndarray],
    real: SliceSet,
    window: str,
    level: Level,
    subset: int,
    subsets: int,
    seed: int,
) -> list[KernelRow]:
    """Distances in one window, in the features of one level.

    Args:
        features: of the real slices under ``real``, of other sets under their names.
        real: the slices of the reference.
    """
    held_out = real.held_out
    own = standardized(features["real"], features["real"])

    def row(name: str, found: np.ndarray, reference: str, theirs: np.ndarray) -> KernelRow:
        distance = kernel_distance(found, theirs, subset, subsets, np.random.default_rng(seed))
        return KernelRow(window, level, name, reference, distance)

    halves = between_halves(own, real.patients.tolist(), subset, subsets, np.random.default_rng(seed))
    rows = [KernelRow(window, level, "real, random half of the patients", "the other half", halves)]
    rows.append(row("real, patients of pretraining", own[~held_out], "held-out", own[held_out]))
    for name, found in features.items():
        if name != "real":
            other = standardized(found, features["real"])
            rows.append(row(name, other, "held-out", own[held_out]))
            rows.append(row(name, other, "of pretraining", own[~held_out]))
    return rows


# -- contrast --------------------------------------------------------------------------------------------------------


def contrast_probe(
    methods: Sequence[Method],
    slices: SliceSet,
    vectors: Callable[[SliceFeatures, SliceSet], np.ndarray],
    folds: int = 10,
    repeats: int = 3,
    draws: int = DRAWS,
    seed: int = 0,
) -> ContrastResult:
    """Contrast medium or not: every probe trains on all other patients, and is scored twice.

    Args:
        methods: to compare.
        slices: with contrast flags.
        vectors: features of a model, (N, D).

    Returns:
        Scores on the patients that pretraining never saw, and on all.
    """
    assert slices.contrast is not None
    held_out = slices.held_out
    result = ContrastResult()
    for method in methods:
        answers = [
            cross_validated(vectors(member, slices), slices.contrast, slices.patients, folds, repeats, seed)
            for member in method.members
        ]
        for kind, chosen in (("held-out", held_out), ("all", np.ones(len(slices), bool))):
            rows = [answer[chosen] for answer in answers]
            scores = score_classifier(rows, slices.contrast[chosen], slices.patients[chosen], draws, seed)
            result.scores.setdefault(kind, {})[method.name] = scores
    return result


# -- pixels ----------------------------------------------------------------------------------------------------------


def training_groups(patients: Sequence[str], size: int) -> list[list[str]]:
    """Disjoint choices of ``size`` training patients, three at most."""
    starts = range(0, len(patients) - size + 1, size)
    return [list(patients[start : start + size]) for start in starts][:_MOST_GROUPS]


@dataclass
class _PixelTask:
    """Training slices and tests, on the places of a lattice."""

    train: SliceSet
    tests: dict[str, SliceSet]
    places: np.ndarray
    seed: int
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        both = {str(name) for name in self.train.patients} & {str(n) for t in self.tests.values() for n in t.patients}
        if both:
            raise ValueError(f"patients both in training and in a test: {', '.join(sorted(both))}")
        self.labels = self.at_places(self.train)

    def at_places(self, slices: SliceSet) -> np.ndarray:
        """Labels (N, P)."""
        assert slices.labels is not None
        return slices.labels[:, self.places[:, 0], self.places[:, 1]]

    def fitted(self, features: np.ndarray, patients: Sequence[str]) -> PixelProbe:
        """A probe of some training patients' pixels, the same pixels for every model."""
        chosen = np.flatnonzero(np.isin(self.train.patients, patients))
        rng = np.random.default_rng([self.seed, len(patients)])
        count = min(_PIXELS_PER_SLICE, len(self.places))
        picks = [rng.choice(len(self.places), count, replace=False) for _ in chosen]
        rows = np.concatenate([features[n][pick] for n, pick in zip(chosen, picks, strict=True)])
        labels = np.concatenate([self.labels[n][pick] for n, pick in zip(chosen, picks, strict=True)])
        # One patient has no inner folds by patient; whole slices are the next best.
        owners = self.train.patients[chosen] if len(patients) > 1 else chosen.astype(str)
        return PixelProbe(len(Lobe) + 1).fit(rows, labels, np.repeat(owners, count))


def pixel_probe(
    methods: Sequence[Method],
    train: SliceSet,
    tests: dict[str, SliceSet],
    vectors: Callable[[SliceFeatures, SliceSet], np.ndarray],
    counts: Sequence[int],
    stride: int,
    seed: int = 0,
) -> tuple[list[PixelResult], list[PixelPicture]]:
    """Lobe of each pixel, Dice per patient, with the labels of few patients.

    Args:
        methods: to compare.
        train: phantoms with lobes.
        tests: by name, none of the training patients among them.
        vectors: features of a model, (N, P, D).
        counts: of training patients.
        stride: of the lattice.

    Raises:
        ValueError: a patient is in training and in a test.
    """
    task = _PixelTask(train, tests, lattice(stride), seed)
    patients = list(dict.fromkeys(train.patients.tolist()))
    results = [PixelResult(test, count) for test in tests for count in counts]
    pictures: list[PixelPicture] = []
    for method in methods:
        runs: dict[tuple[str, int], list[dict[str, dict[str, float]]]] = {}
        for member in method.members:
            features = vectors(member, train)
            probes = {n: [task.fitted(features, group) for group in training_groups(patients, n)] for n in counts}
            for test, slices in tests.items():
                seen, truth = vectors(member, slices), task.at_places(slices)
                for count, tried in probes.items():
                    for probe in tried:
                        answer = np.stack([probe.probabilities(rows) for rows in seen])
                        runs.setdefault((test, count), []).append(_dice(answer, truth, slices))
                if member is method.members[0]:
                    pictures.append(_picture(method.name, test, slices, probes[max(counts)][0], seen))
        for result in results:
            result.scores[method.name] = _mean_over_runs(runs[result.test, result.patients])
    return results, pictures


def _dice(probabilities: np.ndarray, truth: np.ndarray, slices: SliceSet) -> dict[str, dict[str, float]]:
    """Patient -> score -> value; all slices of a patient together."""
    lobes = probabilities.argmax(axis=-1).astype(np.uint8)
    lungs = probabilities[..., 0] < 0.5
    scores: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(slices.patients.tolist()):
        mine = (slices.patients == name)[:, None] & (truth != IGNORE)
        scores[name] = {LUNGS: dice(truth[mine] > 0, lungs[mine])}
        if slices.kind is Labels.LOBES:
            each = dice_per_label(truth[mine], lobes[mine], list(Lobe))
            scores[name][LOBES] = float(np.mean([each[lobe] for lobe in Lobe if (truth[mine] == lobe).any()]))
    return scores


def _mean_over_runs(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per patient the mean over seeds and over choices of training patients: neither are cases."""
    keys = [(name, score) for name, scores in runs[0].items() for score in scores]
    means = mean_over_seeds([[run[name][score] for name, score in keys] for run in runs])
    result: dict[str, dict[str, float]] = {}
    for (name, score), value in zip(keys, means, strict=True):
        result.setdefault(name, {})[score] = value
    return result


def _picture(method: str, test: str, slices: SliceSet, probe: PixelProbe, seen: np.ndarray) -> PixelPicture:
    """The middle slice of the first patient."""
    mine = np.flatnonzero(slices.patients == slices.patients[0])
    number = int(mine[len(mine) // 2])
    side = int(np.sqrt(seen.shape[1]))
    found = probe.probabilities(seen[number]).argmax(axis=-1).astype(np.uint8).reshape(side, side)
    assert slices.labels is not None
    return PixelPicture(method, test, slices.middle[number], slices.labels[number], found)


# -- the command -----------------------------------------------------------------------------------------------------


class _Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, log: Log) -> None:
        self.options, self.log = options, log
        self.cache: Path = options.out / "cache"
        self.choice: DeviceChoice = choose_device(options.device, options.precision)
        self.settings = FeatureSettings(
            options.timesteps, options.pixel_timesteps, options.side, options.stride, options.seed
        )
        self.missing: list[str] = []
        self.cards: dict[str, Any] = {}
        self.methods = self._methods()

    def _methods(self) -> list[Method]:
        """The models, the first one's network before training, and no network at all."""
        options = self.options
        models = {name: load_foundation(name, options.weights) for name in options.models}
        first = next(iter(models.values()))
        methods = [Method(name, (self._backbone(name, self._checksum(name, m), m),)) for name, m in models.items()]
        if options.distilled is not None:
            methods.append(self._one_pass(options.models[0], first, options.distilled))
        # What diffusers notes for itself ("_...") comes in another order in each process.
        shape = sorted(item for item in first.network.config.items() if not item[0].startswith("_"))
        config = hashlib.sha256(repr(shape).encode()).hexdigest()
        fresh = [
            self._backbone(f"random {n}", f"random {n} {config} {first.recipe}", random_model(first, 1000 + n))
            for n in range(options.random_seeds)
        ]
        return [*methods, Method(RANDOM, tuple(fresh)), Method("gray values", (GrayFeatures(self.settings),))]

    def _one_pass(self, name: str, model: FoundationModel, path: Path) -> Method:
        network = load_distilled(path, model).network
        identity = (
            f"one pass {hashlib.sha256(path.read_bytes()).hexdigest()} {self.settings} {self.choice.precision.value}"
        )
        title = f"{name}, one pass"
        return Method(title, (OnePassFeatures(title, identity, model, self.settings, self.choice, network=network),))

    def _checksum(self, name: str, model: FoundationModel) -> str:
        assert model.card is not None
        self.cards[name] = {"sha256": model.card.sha256, "version": model.card.version, "training": model.card.training}
        return model.card.sha256

    def _backbone(self, name: str, weight: str, model: FoundationModel) -> BackboneFeatures:
        identity = f"{weight} {self.settings} {self.choice.precision.value}"
        return BackboneFeatures(name, identity, model, self.settings, self.choice)

    def phantoms(self, phantom_seeds: Sequence[int], count: int) -> tuple[SliceSet, SliceSet]:
        """Labeled slices, and slices of any level, of several phantoms."""
        pairs = []
        for seed in phantom_seeds:
            path = self.cache / f"phantom-{seed}-{count}.npz"
            if not path.is_file():
                self.log(f"phantom {seed}")
            pairs.append(kept(path, lambda seed=seed: labeled_phantom(seed, count)))
        return joined([pair[0] for pair in pairs]), joined([pair[1] for pair in pairs])

    def slice_vectors(self, features: SliceFeatures, slices: SliceSet) -> np.ndarray:
        return self._features(features, "slices", slices, features.of_slices)

    def pixel_vectors(self, features: SliceFeatures, slices: SliceSet) -> np.ndarray:
        return self._features(features, "pixels", slices, features.of_pixels)

    def _features(
        self, features: SliceFeatures, kind: str, slices: SliceSet, make: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        begin = time.monotonic()
        found = cached(self.cache, f"{kind}-{features.name}", f"{kind} {features.identity}", slices.hu, make)
        if (seconds := time.monotonic() - begin) > 5:
            self.log(f"{features.name}: {kind} of {len(slices)} in {seconds:.0f} s")
        return found

    def kernel(
        self, real: SliceSet | None, phantoms: SliceSet
    ) -> tuple[list[KernelRow], dict[str, dict[str, SliceSet]]]:
        """Distances, and the sets of each window for the pictures."""
        if real is None:
            return [], {}
        net = FixedNet(self.choice)
        shown: dict[str, dict[str, SliceSet]] = {window: {"real": real} for window in WINDOWS}
        volumes = slices_of_volumes(self.options.data / "ct", _VOLUME_SLICES)
        others = {"phantoms": phantoms} | ({} if volumes is None else {"real, other collections": volumes})
        for window in WINDOWS:
            shown[window] |= others
        for folder in self.options.samples:
            for window, slices in read_samples(folder).items():
                shown[window][f"generated: {folder.name}"] = slices
        rows = []
        for window, sets in shown.items():
            begin = time.monotonic()
            features = {name: self._fixed(net, slices, window) for name, slices in sets.items()}
            for level in Level:
                chosen = {name: found[:, net.columns(level)] for name, found in features.items()}
                counts = (self.options.subset, self.options.subsets, self.options.seed)
                rows += kernel_rows(chosen, real, window, level, *counts)
            self.log(f"kernel distance, {window}: {time.monotonic() - begin:.0f} s")
        return rows, shown

    def _fixed(self, net: FixedNet, slices: SliceSet, window: str) -> np.ndarray:
        identity = f"all levels {net.sha256} {WINDOWS[window]} {self.choice.precision.value}"
        return cached(self.cache, f"fixed-{window}", identity, slices.middle, lambda hu: net(hu, WINDOWS[window]))

    def __call__(self) -> str:
        """Measure all and write the report; its text."""
        options = self.options
        path = options.data / "slices" / "tcga_luad_100slices.npz"
        real = tcga_slices(path) if path.is_file() else None
        if real is None:
            self.missing.append(f"contrast and kernel distance: slices/{path.name} is not in the data folder")
        test, levels = self.phantoms(seeds("synthetic_test")[: options.phantoms], _TEST_SLICES)
        rows, shown = self.kernel(real, levels)
        contrast = None
        if real is not None:
            contrast = contrast_probe(
                self.methods, real, self.slice_vectors, options.folds, options.repeats, options.draws, options.seed
            )
            self.log("contrast probes done")
        train, _ = self.phantoms(range(TRAIN_SEED, TRAIN_SEED + max(options.labeled)), _TRAIN_SLICES)
        found, missing = labeled_real(options.data, _REAL_SLICES)
        self.missing += missing
        tests = {"phantoms": test} | {str(case.patients[0]): case for case in found}
        pixels, pictures = pixel_probe(
            self.methods, train, tests, self.pixel_vectors, options.labeled, options.stride, options.seed
        )
        return write_report(
            options.out, rows, contrast, pixels, self._told(), self.missing, shown, pictures, options.draws
        )

    def _told(self) -> dict[str, Any]:
        options = self.options
        return {
            "version": LCTfoundLib.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": f"{self.choice.device} {self.choice.precision.value}",
            "split_manifest_sha256": hashlib.sha256(MANIFEST.read_bytes()).hexdigest(),
            "models": self.cards,
            "methods": [method.name for method in self.methods],
            "timesteps": list(options.timesteps),
            "pixel timesteps": list(options.pixel_timesteps),
            "side": options.side,
            "stride": options.stride,
            "random seeds": options.random_seeds,
            "folds": options.folds,
            "repeats": options.repeats,
            "test phantoms": options.phantoms,
            "training phantoms from seed": TRAIN_SEED,
            "draws": options.draws,
            "seed": options.seed,
        }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Is the pretraining of the foundation model worth having?")
    parser.add_argument("--weights", type=Path, help="folder of the weights; default: the shipped ones")
    parser.add_argument("--models", default="backbone_student", help="names of weights, the one in question first")
    parser.add_argument("--distilled", type=Path, help="single-pass extractor of the first model, to compare with")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="folders of generated slices (.npz)")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the real data")
    parser.add_argument("--out", type=Path, default=Path("output/foundation"))
    parser.add_argument("--seed", type=int, default=0, help="of noise, folds, subsets and bootstrap")
    parser.add_argument("--timesteps", type=_numbers, default=FeatureSettings.timesteps, help="of the contrast probe")
    parser.add_argument("--pixel-timesteps", type=_numbers, default=FeatureSettings.pixel_timesteps)
    parser.add_argument(
        "--side", type=int, default=FeatureSettings.side, help="pixels (1.5 mm) in the middle for the contrast probe"
    )
    parser.add_argument("--stride", type=int, default=FeatureSettings.stride, help="pixels between scored pixels")
    parser.add_argument("--random-seeds", type=int, default=2, help="random initializations")
    parser.add_argument("--phantoms", type=int, default=20, help="test phantoms, 20 at most")
    parser.add_argument("--labeled", type=_numbers, default=(1, 3, 6), help="training phantoms of the pixel probe")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="of the folds of the contrast probe")
    parser.add_argument("--subset", type=int, default=40, help="slices in a subset of the kernel distance")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: the fastest that is safe")
    options = parser.parse_args(arguments)
    options.models = list(dict.fromkeys(options.models.split(",")))
    if options.side % 16 or not 16 <= options.side <= 256:
        parser.error("--side must be a multiple of 16, 256 at most")
    if options.random_seeds < 1 or min(options.labeled) < 1:
        parser.error("--random-seeds and --labeled must be 1 at least")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with command() as log:
        print(_Run(options, log)())
        log(f"written to {options.out}")


if __name__ == "__main__":
    main()
