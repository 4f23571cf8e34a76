"""The segmentation net: shapes, folding, and the position channels that keep left and right apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from LCTfoundLib.networks.inputs import IN_CHANNELS, LungBox, network_input
from LCTfoundLib.networks.unet3d import UNet3D, UNet3DConfig, fuse_batch_norm


@pytest.fixture
def small_config() -> UNet3DConfig:
    return UNet3DConfig(IN_CHANNELS, (4, 6), channels=(4, 6, 8), blocks=(0, 1, 1), auxiliary=(1,))


def test_logits_have_one_channel_per_class_and_the_size_of_the_input(small_config: UNet3DConfig) -> None:
    network = UNet3D(small_config).eval()
    logits = network(torch.randn(2, IN_CHANNELS, 8, 12, 16))
    assert logits.shape == (2, 10, 8, 12, 16)
    assert [part.shape[1] for part in network.split(logits)] == [4, 6]


def test_training_mode_adds_one_coarser_prediction_per_auxiliary_level(small_config: UNet3DConfig) -> None:
    outputs = UNet3D(small_config).train()(torch.randn(1, IN_CHANNELS, 8, 8, 8))
    assert [tuple(o.shape[2:]) for o in outputs] == [(8, 8, 8), (4, 4, 4)]


def test_folding_batch_norm_does_not_change_the_function(small_config: UNet3DConfig) -> None:
    torch.manual_seed(3)
    network = UNet3D(small_config).train()
    for _ in range(3):  # running statistics that differ from their initial values
        network(torch.randn(2, IN_CHANNELS, 8, 8, 8) * 3 + 1)
    network.eval()
    x = torch.randn(1, IN_CHANNELS, 8, 8, 8)
    with torch.no_grad():
        before = network(x)
        after = fuse_batch_norm(network)(x)
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in network.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_config_survives_the_cards_json(small_config: UNet3DConfig) -> None:
    import json

    assert UNet3DConfig.from_dict(json.loads(json.dumps(small_config.to_dict()))) == small_config


def test_inference_weights_load_without_the_auxiliary_heads(small_config: UNet3DConfig) -> None:
    network = UNet3D(small_config)
    missing, unexpected = UNet3D(small_config).load_state_dict(network.inference_state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith("auxiliary_heads.") for key in missing)


def test_position_runs_from_minus_one_to_one_over_the_lung_box_in_world_axes() -> None:
    spacing, origin = (0.8, 0.9, 2.0), (-40.0, 10.0, -300.0)
    ct = torch.zeros(11, 21, 31)
    box = LungBox((origin[0], origin[1], origin[2]), (origin[0] + 0.8 * 30, origin[1] + 0.9 * 20, origin[2] + 2.0 * 10))
    channels = network_input(ct, spacing, origin, box)
    assert channels.shape == (IN_CHANNELS, 11, 21, 31)
    corner, opposite = channels[2:, 0, 0, 0], channels[2:, -1, -1, -1]
    np.testing.assert_allclose(corner, [-1, -1, -1], atol=1e-5)
    np.testing.assert_allclose(opposite, [1, 1, 1], atol=1e-5)


def test_a_crop_sees_the_same_channels_as_the_whole() -> None:
    rng = np.random.default_rng()
    ct = torch.from_numpy(rng.normal(-500, 400, (10, 12, 14)).astype(np.float32))
    spacing, origin = (0.7, 0.7, 1.25), (-100.0, -80.0, 30.0)
    box = LungBox((-98.0, -78.0, 31.0), (-92.0, -73.0, 40.0))
    whole = network_input(ct, spacing, origin, box)
    cut = network_input(ct[2:, 3:, 4:], spacing, (origin[0] + 4 * 0.7, origin[1] + 3 * 0.7, origin[2] + 2 * 1.25), box)
    torch.testing.assert_close(cut, whole[:, 2:, 3:, 4:], rtol=1e-5, atol=1e-5)


def test_box_of_a_mask_is_its_extent_in_world_coordinates() -> None:
    mask = np.zeros((8, 9, 10), bool)
    mask[2:5, 3:7, 4] = True
    box = LungBox.of_mask(mask, (0.5, 2.0, 3.0), (1.0, 2.0, 3.0))
    assert box.low == (3.0, 8.0, 9.0) and box.high == (3.0, 14.0, 15.0)
