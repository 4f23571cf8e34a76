"""Training samples of the phantom: labels, position and what is ignored."""

from __future__ import annotations

import numpy as np
import pytest

from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Context, Tree
from training.generate import coarse_samples, fine_samples, region_codes
from training.losses import IGNORE
from training.phantom.thorax import Organ
from training.samples import Sample


@pytest.fixture(scope="module")
def coarse() -> Sample:
    return coarse_samples(seed=5, scans=1)[0]


def test_segments_win_over_organs_and_organs_become_context() -> None:
    segments = np.array([[[0, 7, 0]]], np.uint8)
    organs = np.array([[[Organ.AORTA, Organ.LUNG, Organ.FAT]]], np.uint8)
    assert region_codes(segments, organs).tolist() == [[[Context.AORTA, 7, 0]]]


def test_a_coarse_sample_names_all_segments_and_agrees_with_its_lobes(coarse: Sample) -> None:
    assert set(range(1, 19)) <= set(np.unique(coarse.regions))
    inside = coarse.regions <= 18
    np.testing.assert_array_equal(LOBE_OF_SEGMENT[coarse.regions[inside]], coarse.lobes[inside])


def test_the_box_holds_the_lungs_and_little_more(coarse: Sample) -> None:
    k, j, i = np.nonzero(coarse.lobes)
    x = coarse.origin[0] + coarse.spacing[0] * i
    assert x.min() == pytest.approx(coarse.box.low[0], abs=0.01)
    assert x.max() == pytest.approx(coarse.box.high[0], abs=0.01)
    margin = coarse.lobes.shape[2] * coarse.spacing[0] - (coarse.box.high[0] - coarse.box.low[0])
    assert margin < 50


def test_right_segments_lie_on_the_patients_right(coarse: Sample) -> None:
    right, left = (np.nonzero((coarse.regions >= a) & (coarse.regions <= b))[2].mean() for a, b in ((1, 10), (11, 18)))
    assert right < left


def test_skeletons_lie_on_visible_branches(coarse: Sample) -> None:
    on = coarse.skeleton > 0
    assert on.any()
    assert (coarse.trees[on] == coarse.skeleton[on]).mean() > 0.95


def test_fine_boxes_hold_trees_as_air_and_blood() -> None:
    samples = fine_samples(seed=6, boxes=2, size=64)
    assert [s.ct.shape for s in samples] == [(64, 64, 64)] * 2
    for sample in samples:
        assert set(np.unique(sample.trees)) <= {0, *Tree, IGNORE}
        lung = (sample.lobes > 0) & (sample.trees == 0)
        if lung.sum() > 1000:
            assert -1000 < np.median(sample.ct[lung]) < -500
