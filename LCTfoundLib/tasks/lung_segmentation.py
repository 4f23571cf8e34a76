"""Whole-lung segmentation: a chest CT in, 21 structures out.

Coarse net (3 mm, whole chest) -> fine net (0.8-1.5 mm, lungs and hila) -> skeleton graphs, repaired and separated
-> labeled segmental bronchi -> territories within each lobe -> the input's own grid.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

import LCTfoundLib
from LCTfoundLib.anatomy.airway_labels import label_airway
from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.lungs import find_lungs, refine_lungs
from LCTfoundLib.anatomy.masks import bounding_box, coarse_grid, crop, resample
from LCTfoundLib.anatomy.quality import Finding
from LCTfoundLib.anatomy.repair import AirwayTree, repair_airway
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Context, Lobe, Tree
from LCTfoundLib.errors import UnsuitableImage
from LCTfoundLib.networks.inputs import LungBox
from LCTfoundLib.networks.lung import (
    COARSE,
    FINE,
    CoarseProbabilities,
    FineProbabilities,
    LoadedNet,
    load_net,
    predict_coarse,
    predict_fine,
)
from LCTfoundLib.runtime.device import DeviceChoice, choose_device
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume

__all__ = ["LungRequest", "LungResult", "Quality", "segment_lungs"]
