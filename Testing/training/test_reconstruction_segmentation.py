"""Segmentation of reconstructions, on an ellipsoid chest with a threshold for the nets."""

from __future__ import annotations

import numpy as np
import pytest

from LCTfoundLib.anatomy.structures import SEGMENTS, Lobe, Tree
from LCTfoundLib.errors import LCTfoundError, UnsuitableImage
from LCTfoundLib.volume import Volume
from training.evaluate.reconstruction_segmentation import (
    compare_segmentations,
    main,
    reconstructors,
    segment_dice,
    table,
)
from training.evaluate.scoring import Prediction

pytestmark = pytest.mark.usefixtures("one_thread")


def dark(ct: Volume) -> Prediction:
    """What is dark in the middle of the body: code 1 on the one side, 11 on the other; the densest is an artery."""
    inside = np.zeros(ct.shape, bool)
    inside[:, 12:-24, 8:-8] = True
    lungs = (ct.array < -500) & inside
    codes = np.where(np.arange(ct.shape[2]) < ct.shape[2] // 2, 1, 11)
    trees = np.where(lungs & (ct.array < -920), Tree.AIRWAY, 0)
    return Prediction((lungs * codes).astype(np.uint8), trees.astype(np.uint8))


def test_more_views_segment_better(simple_chest):
    ct = Volume(simple_chest.array[28:32], simple_chest.spacing)
    methods = reconstructors(["fbp", "preview"], None, "cpu")
    few, many = (compare_segmentations("x", ct, methods, dark, views)[0] for views in (6, 40))
    for method in methods:
        assert few.dice[method]["Lungs"] < many.dice[method]["Lungs"] and many.dice[method]["Lungs"] > 0.93
    assert many.size == 88 and set(many.seconds) == set(methods) and not many.refused
    assert len(many.dice["fbp"]) == 3 + len(Lobe) + len(SEGMENTS) + len(Tree)
    assert many.dice["fbp"]["Segments, mean"] == pytest.approx(
        np.mean([many.dice["fbp"][s.short] for s in SEGMENTS if s.code in (1, 11)])
    )
    text = table(many)
    assert f"| Lungs | {many.dice['fbp']['Lungs']:.3f} | {many.dice['preview']['Lungs']:.3f} |" in text
    assert f"| {SEGMENTS[4].short} | - | - |" in text


def test_the_picture_shows_every_method_and_a_refusal_counts_as_nothing(simple_chest):
    ct = Volume(simple_chest.array[28:31], simple_chest.spacing)

    def exact(scan, grid):
        return np.pad(np.maximum(ct.array, -1000), ((0, 0), (12, 12), (0, 0)), constant_values=-1000).astype(np.float32)

    def empty(scan, grid):
        return np.zeros((3, 88, 88), np.float32)

    def segment(volume: Volume) -> Prediction:
        if volume.array.max() == 0:
            raise UnsuitableImage("no lungs in view")
        return dark(volume)

    result, picture = compare_segmentations("x", ct, {"exact": exact, "empty": empty}, segment, 8)
    assert result.dice["exact"]["Lungs"] == 1 and result.dice["empty"]["Lungs"] == 0
    assert result.refused == {"empty": "no lungs in view"} and "no lungs in view" in table(result)
    columns = np.split(np.asarray(picture), 3, axis=1)
    assert np.array_equal(columns[0][40:], columns[1][40:]) and (columns[2][40:] == columns[2][100, 100]).all()


def test_dice_of_all_structures(rng):
    first, second = (
        Prediction(rng.integers(0, 19, (6, 7, 8)).astype(np.uint8), rng.integers(0, 4, (6, 7, 8)).astype(np.uint8))
        for _ in range(2)
    )
    scores = segment_dice(first, second)
    a, b = first.segments == 5, second.segments == 5
    assert scores[SEGMENTS[4].short] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert all(value == 1 for value in segment_dice(first, first).values())


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(LCTfoundError, match="no method magic; choose among fbp"):
        reconstructors(["magic"], None, "cpu")
    with pytest.raises(SystemExit, match=r"LUNG1-001_ct\.nii\.gz is not in the data folder"):
        main(["--cases", "LUNG1-001", "--data", str(tmp_path), "--device", "cpu"])
