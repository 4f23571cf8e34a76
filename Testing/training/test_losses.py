"""Losses against plain, slow definitions, on fresh random input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from training.losses import IGNORE, HeadTarget, head_loss


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng()
    logits = torch.from_numpy(rng.normal(0, 2, (2, 4, 5, 6, 7)))
    labels = torch.from_numpy(rng.integers(0, 4, (2, 5, 6, 7)))
    labels[0, 0, :2] = IGNORE
    skeleton = torch.from_numpy(rng.integers(0, 4, (2, 5, 6, 7)) * (rng.random((2, 5, 6, 7)) < 0.2))
    return logits, labels, skeleton.to(torch.uint8)


def slow_loss(logits: torch.Tensor, labels: torch.Tensor, skeleton: torch.Tensor | None) -> float:
    """Cross entropy by torch, Dice and recall by loops over classes."""
    total = float(F.cross_entropy(logits, labels, ignore_index=IGNORE))
    p = logits.softmax(1)
    known = labels != IGNORE
    dices = []
    for c in range(1, logits.shape[1]):
        truth = (labels == c) & known
        if truth.any():
            pc = p[:, c][known]
            dices.append(1 - (2 * float(p[:, c][truth].sum()) + 1) / (float(pc.sum()) + int(truth.sum()) + 1))
    total += float(np.mean(dices))
    if skeleton is not None:
        recalls = [float(p[:, c][skeleton == c].mean()) for c in range(1, logits.shape[1]) if (skeleton == c).any()]
        total += 1 - float(np.mean(recalls))
    return total


def test_loss_matches_its_definition(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    logits, labels, skeleton = case
    assert float(head_loss(logits, HeadTarget(labels))) == pytest.approx(slow_loss(logits, labels, None), rel=1e-4)
    with_trees = float(head_loss(logits, HeadTarget(labels, skeleton)))
    assert with_trees == pytest.approx(slow_loss(logits, labels, skeleton), rel=1e-4)


def test_ignored_voxels_change_nothing(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    logits, labels, _ = case
    other = logits.clone()
    other[0, :, 0, :2] = 7 * torch.randn_like(other[0, :, 0, :2])
    assert float(head_loss(logits, HeadTarget(labels))) == pytest.approx(float(head_loss(other, HeadTarget(labels))))


def test_a_perfect_prediction_costs_nothing_and_a_broken_branch_costs(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    _, labels, _ = case
    labels = labels.clamp(max=3)
    perfect = F.one_hot(labels, 4).movedim(-1, 1).float() * 50
    target = HeadTarget(labels, labels.to(torch.uint8))
    assert float(head_loss(perfect, target)) < 1e-3
    broken = perfect.clone()
    broken[:, :, 2] = torch.tensor([50.0, 0, 0, 0])[None, :, None, None]
    assert float(head_loss(broken, target)) > 0.1
