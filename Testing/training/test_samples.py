"""Pool and crops: what the trainer reads is what the generator wrote, in the right place."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from LCTfoundLib.networks.inputs import LungBox
from training.losses import IGNORE
from training.samples import Pool, Sample, SampleDataset, load_sample, save_sample


@pytest.fixture
def sample() -> Sample:
    rng = np.random.default_rng()
    shape = (20, 16, 18)
    return Sample(
        rng.integers(-1000, 300, shape).astype(np.int16),
        rng.integers(0, 26, shape).astype(np.uint8),
        rng.integers(0, 6, shape).astype(np.uint8),
        rng.integers(0, 4, shape).astype(np.uint8),
        rng.integers(0, 4, shape).astype(np.uint8),
        (1.0, 1.5, 2.0),
        (-10.0, 5.0, 7.0),
        LungBox((-9.0, 6.0, 8.0), (6.0, 27.0, 44.0)),
    )


def test_a_sample_survives_the_file(sample: Sample, tmp_path: Path) -> None:
    save_sample(sample, tmp_path / "a.npz")
    again = load_sample(tmp_path / "a.npz")
    for key in ("ct", "regions", "lobes", "trees", "skeleton"):
        np.testing.assert_array_equal(getattr(again, key), getattr(sample, key))
    assert (again.spacing, again.origin, again.box) == (sample.spacing, sample.origin, sample.box)


def test_a_pool_keeps_no_more_than_its_capacity_and_drops_the_oldest(sample: Sample, tmp_path: Path) -> None:
    import os

    pool = Pool(tmp_path, capacity=3)
    for index in range(5):
        pool.add(sample, f"{index}")
        os.utime(tmp_path / f"{index}.npz", (index, index))
    assert [path.stem for path in pool.files()] == ["2", "3", "4"]


def test_crops_of_labels_image_and_position_belong_together(sample: Sample, tmp_path: Path) -> None:
    sample.regions[...] = np.arange(20)[:, None, None]  # the slice number
    dataset = SampleDataset(Pool(tmp_path), (8, 8, 8), seed=1)
    item = dataset.item(sample, random.Random())
    slices = item["regions"][:, 0, 0].float()
    z = sample.origin[2] + sample.spacing[2] * slices
    position = item["input"][2, :, 0, 0]
    slope = torch.diff(position) / torch.diff(z)
    assert torch.allclose(slope, slope[:1].expand_as(slope), atol=1e-4) and slope[0] > 0
    assert item["input"].shape == (5, 8, 8, 8)


def test_outside_the_volume_nothing_is_learned(sample: Sample, tmp_path: Path) -> None:
    dataset = SampleDataset(Pool(tmp_path), (24, 16, 18), seed=1, augment=False)
    item = dataset.item(sample, random.Random())
    assert (item["trees"][:2] == IGNORE).all() and (item["trees"][2:22] != IGNORE).all()


def test_an_empty_pool_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="training.generate"):
        Pool(tmp_path).draw(random.Random(), wait_seconds=0.1)
