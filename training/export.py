"""Turn a training run into a shipped weight: EMA weights in float16 with a card.

python -m training.export training/configs/coarse.toml --run runs/coarse --out Resources/Weights
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch

from LCTfoundLib.anatomy.structures import SEGMENTS, Context, Lobe, Tree
from LCTfoundLib.networks.unet3d import UNet3D, UNet3DConfig
from LCTfoundLib.weights.registry import Card, DataSource, save_weight
from training.segmentation import commit_hash, hardware

__all__ = ["HEAD_CLASSES", "export_run", "main"]

#: Class names of each head, in channel order.
HEAD_CLASSES: dict[str, tuple[str, ...]] = {
    "regions": ("background", *(s.key for s in SEGMENTS), *(c.name.lower() for c in Context)),
    "trees": ("background", *(t.name.lower() for t in Tree)),
    "lobes": ("outside", *(lobe.name.lower() for lobe in Lobe)),
}

_LIMITS = (
    "Trained on synthetic chests only; research use, no medical device. Thick slices (above 3 mm), severe pathology, "
    "children and anatomy after surgery are outside what was measured; see the findings in each result."
)


def export_run(config: dict[str, Any], run: Path, out: Path, version: str, numbers: dict[str, Any]) -> Card:
    """Write ``<name>.safetensors`` and its card; returns the card with checksum and size."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    parameters = {**config["network"], "auxiliary": []}
    network = UNet3D(UNet3DConfig.from_dict(parameters))
    weights = {key: value for key, value in state["ema"].items() if not key.startswith("auxiliary_heads.")}
    network.load_state_dict(weights)
    weights = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    card = Card(
        name=config["name"],
        version=version,
        task=config["task"],
        architecture="UNet3D",
        architecture_parameters=parameters,
        spacing=(config["spacing"],) * 3,
        classes=tuple(name for head in config["heads"] for name in HEAD_CLASSES[head]),
        data=(DataSource("LCTfound procedural thorax phantom (training/phantom)", "Apache-2.0"),),
        license="Apache-2.0",
        seed=int(config.get("seed", 0)),
        commit=commit_hash(),
        numbers=numbers,
        intended_use="Segmentation of 21 lung structures on chest CT in adults, for research and planning research.",
        limits=_LIMITS,
        training={"steps": state["step"], "seconds": round(state["seconds"]), "hardware": hardware()},
    )
    return save_weight(weights, card, out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Export a training run as a shipped weight.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--version", default="1")
    parser.add_argument("--numbers", type=Path, help="JSON file with measured results, as the evaluation writes it")
    options = parser.parse_args(arguments)
    config = tomllib.loads(options.config.read_text())
    numbers = json.loads(options.numbers.read_text()) if options.numbers else {}
    card = export_run(config, options.run, options.out, options.version, numbers)
    parser.exit(0, f"{card.name}: {card.bytes / 1e6:.2f} MB, sha256 {card.sha256}\n")


if __name__ == "__main__":
    main()
