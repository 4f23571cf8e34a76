"""Turn a pretraining run into a weight: averaged weights of network and condition encoder in float16, with a card.

python -m training.export_backbone runs/student --name backbone_student --out Resources/Weights --numbers numbers.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from LCTfoundLib.errors import LCTfoundError
from LCTfoundLib.networks.backbone import backbone_config
from LCTfoundLib.networks.features import Prediction
from LCTfoundLib.networks.foundation import InputRecipe, save_foundation
from LCTfoundLib.weights.registry import Card, DataSource
from training.pretrain import averaged_weights, newest_checkpoint
from training.segmentation import commit_hash
from training.shard_stream import Augmentation

__all__ = ["DATA_NAMES", "LICENSES", "export_backbone", "main", "strictest"]

#: SPDX names, from free to strict; a weight has the strictest of its data's.
LICENSES = (
    "CC0-1.0", "Apache-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
)  # fmt: skip
DATA_NAMES = {
    "phantom": "LCTfound procedural thorax phantom (training/phantom)",
    "LIDC-IDRI-0003": "LIDC-IDRI, one patient (The Cancer Imaging Archive)",
    "4D-Lung_113_HM10395_p40": "4D-Lung, one patient (The Cancer Imaging Archive)",
    "TotalSegmentator_aorta_example": "TotalSegmentator's example CT of an aorta",
    "tcga_luad_100slices": "TCGA-LUAD, single slices (The Cancer Imaging Archive)",
}
#: Settings of the augmentation that tell how large a whole slice was.
_SIZES = ("size", "canvas", "whole")
_LIMITS = (
    "Research use, no medical device. Images it draws are synthetic and no patient's. Its channels are three "
    "neighboring slices. Trained for a short time on a CPU, mostly on synthetic chests: its images lack fine detail, "
    "and diseases that it was told of in synthetic chests only are told by their synthetic looks."
)


def strictest(licenses: list[str]) -> str:
    """Of several licenses.

    Raises:
        LCTfoundError: one is unknown here, so that nobody can say which is the strictest.
    """
    unknown = sorted(set(licenses) - set(LICENSES))
    if unknown or not licenses:
        raise LCTfoundError(
            f"The data's license '{', '.join(unknown)}' is unknown; add it to LICENSES by its strictness."
        )
    return max(licenses, key=LICENSES.index)


def export_backbone(
    run: Path, name: str, out: Path, version: str, numbers: dict[str, Any], step: int | None = None
) -> Card:
    """Write the weight of a run's checkpoint; returns its card with checksum and size.

    Args:
        run: folder of the run.
        name: of the weight.
        out: folder of the weight.
        version: of the weight.
        numbers: measured results.
        step: of the checkpoint; None takes the newest.

    Raises:
        LCTfoundError: no such checkpoint, or data of unknown license.
    """
    checkpoint = newest_checkpoint(run) if step is None else run / f"checkpoints/step-{step:08d}"
    if checkpoint is None or not checkpoint.is_dir():
        raise LCTfoundError(f"{run} holds no such checkpoint; check the path and the step.")
    told = json.loads((checkpoint / "progress.json").read_text())
    config = told["config"]
    network, encoder = averaged_weights(checkpoint)
    data = tuple(DataSource(DATA_NAMES.get(source, source), name.replace(" ", "-")) for source, name in told["data"])
    card = Card(
        name=name,
        version=version,
        task="foundation model, backbone",
        architecture="",
        architecture_parameters={},
        spacing=(1.5, 1.5, 2.5),
        classes=(),
        data=data,
        license=strictest([source.license for source in data]),
        seed=int(config.get("seed", 0)),
        commit=commit_hash(),
        numbers=numbers,
        intended_use="Features for adapters, restoration and generation of chest CT slices, for research.",
        limits=_LIMITS,
        training={
            "steps": told["step"],
            "seconds": round(told["seconds"]),
            "slices_per_step": config["optimizer"]["batch"] * config["optimizer"].get("accumulate", 1),
            "pretext": config.get("pretext", {}),
            "windows": config.get("windows", {}),
            "small": config.get("small", {}),
            "augmentation": config["augmentation"],
            "begun_from": told.get("begun_from"),
            "processes": told["processes"],
        },
    )
    shown = Augmentation(**{key: value for key, value in config["augmentation"].items() if key in _SIZES})
    side = shown.size if shown.whole > 0 else max(shown.size, shown.canvas)
    side = config.get("small", {}).get("size", side)
    recipe = replace(InputRecipe.from_dict(config["input"]), side=side)
    arguments = backbone_config(config["preset"], **config.get("network", {}))
    prediction = Prediction(config.get("prediction", Prediction.EPSILON))
    return save_foundation(network, encoder, arguments, recipe, card, out, prediction)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a pretraining run as a weight.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", default="1")
    parser.add_argument("--numbers", type=Path, help="JSON file with measured results, for the card")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    options = parser.parse_args(arguments)
    numbers = json.loads(options.numbers.read_text()) if options.numbers else {}
    try:
        card = export_backbone(options.run, options.name, options.out, options.version, numbers, options.step)
    except LCTfoundError as error:
        parser.exit(2, f"{error}\n")
    parser.exit(0, f"{card.name}: {card.bytes / 1e6:.2f} MB, {card.license}, sha256 {card.sha256}\n")


if __name__ == "__main__":
    main()
