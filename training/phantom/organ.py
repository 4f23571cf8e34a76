"""Codes of the organ layer of a phantom."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Organ"]


class Organ(IntEnum):
    """Codes of the organ layer."""

    AIR = 0
    FAT = 1
    MUSCLE = 2
    BONE_CORTEX = 3
    BONE_MARROW = 4
    CARTILAGE = 5
    LUNG = 6
    MEDIASTINAL_FAT = 7
    MYOCARDIUM = 8
    LEFT_VENTRICLE = 9
    RIGHT_VENTRICLE = 10
    LEFT_ATRIUM = 11
    RIGHT_ATRIUM = 12
    AORTA = 13
    VENA_CAVA = 14
    ESOPHAGUS = 15
    LIVER = 16
    SPLEEN = 17
    STOMACH = 18
    BREAST = 19
    SPINAL_CANAL = 20
    SKIN = 21
    TABLE = 22
    THYROID = 23
    GREAT_VESSEL = 24
    BRACHIOCEPHALIC_VEIN = 25
    BOWEL_GAS = 26
    LYMPH_NODE = 27
    EFFUSION = 28
