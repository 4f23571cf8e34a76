"""Losses of the segmentation nets: cross entropy + soft Dice per head, and skeleton recall for the trees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["IGNORE", "HeadTarget", "head_loss", "rows"]

#: Label of voxels no loss is computed on (branches too thin for the scan to show).
IGNORE = 255


@dataclass
class HeadTarget:
    """Targets of one softmax head.

    Attributes:
        labels: (N, K, J, I) int64 or uint8, ``IGNORE`` where unknown.
        skeleton: (N, K, J, I) uint8, the class on (dilated) centerlines, 0 elsewhere; None for heads without trees.
    """

    labels: Tensor
    skeleton: Tensor | None = None

    def strided(self, factor: int) -> HeadTarget:
        """Targets of a coarser decoder level, by taking every ``factor``-th voxel."""
        pick = (slice(None), *(slice(None, None, factor),) * 3)
        return HeadTarget(self.labels[pick], None if self.skeleton is None else self.skeleton[pick])


def rows(logits: Tensor) -> Tensor:
    """(N, C, K, J, I) -> (N*K*J*I, C). With channels-last memory this is a view, and softmax over rows is fast."""
    return logits.permute(0, 2, 3, 4, 1).reshape(-1, logits.shape[1])


def head_loss(logits: Tensor, target: HeadTarget, skeleton_weight: float = 1.0, tree_cost: float = 1.0) -> Tensor:
    """Cross entropy + (1 - soft Dice over the classes present) + skeleton recall.

    Skeleton recall (Kirchhoff et al., 2404.03010): soft recall of the class on the dilated centerlines of the truth,
    which punishes a broken branch as much as a missing trunk of the same length, at a fraction of clDice's cost.

    Args:
        logits: (N, C, K, J, I).
        target: labels and, for trees, skeletons.
        skeleton_weight: weight of the recall term.
        tree_cost: weight of the cross entropy of labeled (non-background) voxels, to balance thin structures.
    """
    scores = rows(logits)
    labels = target.labels.reshape(-1).long()
    known = labels != IGNORE
    labels = torch.where(known, labels, 0)
    weights = known.float()
    log_p = F.log_softmax(scores.float(), dim=1)
    log_p_true = log_p.gather(1, labels[:, None])[:, 0]
    costs = weights if tree_cost == 1.0 else weights * torch.where(labels > 0, tree_cost, 1.0)
    cross_entropy = -(log_p_true * costs).sum() / costs.sum().clamp(min=1.0)

    classes = scores.shape[1]
    p = log_p.exp() * weights[:, None]
    p_true = log_p_true.exp() * weights
    zeros = torch.zeros(classes, device=scores.device)
    overlap = zeros.index_add(0, labels, p_true)
    size = zeros.index_add(0, labels, weights)
    dice = (2 * overlap + 1.0) / (p.sum(0) + size + 1.0)
    present = (size > 0).float()
    present[0] = 0.0
    loss = cross_entropy + ((1 - dice) * present).sum() / present.sum().clamp(min=1.0)
    if target.skeleton is not None:
        loss = loss + skeleton_weight * _skeleton_loss(log_p, target.skeleton.reshape(-1), classes)
    return loss


def _skeleton_loss(log_p: Tensor, skeleton: Tensor, classes: int) -> Tensor:
    on = torch.nonzero(skeleton > 0)[:, 0]
    if on.numel() == 0:
        return log_p.sum() * 0.0
    truth = skeleton[on].long()
    p = log_p[on].gather(1, truth[:, None])[:, 0].exp()
    zeros = torch.zeros(classes, device=log_p.device)
    recall = zeros.index_add(0, truth, p)
    count = zeros.index_add(0, truth, torch.ones_like(p))
    present = count > 0
    return 1 - (recall[present] / count[present]).mean()
