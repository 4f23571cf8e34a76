"""Backbones small enough to train in a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from LCTfoundLib.networks.backbone import backbone_config, build_backbone

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["two_levels"]


def two_levels(widths: tuple[int, int] = (16, 32), groups: int = 8) -> UNet2DConditionModel:
    """The student with two levels: enough to learn something, in a fraction of a second a step."""
    config = backbone_config(
        "student",
        block_out_channels=widths,
        norm_num_groups=groups,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return build_backbone(config).eval()
