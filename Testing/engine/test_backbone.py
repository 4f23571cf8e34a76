"""The backbone: published size and keys, official folders read whole or refused with the remedy."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.backbone import (
    ARCHITECTURE,
    CHANNELS,
    EMBEDDING_SIZE,
    Preset,
    backbone_config,
    build_backbone,
    decoder_channels,
    load_backbone,
    load_official,
    parameter_count,
    save_official,
)
from LCTfoundLib.weights.registry import Card, DataSource, save_weight

#: The published configuration at a width that a test can afford.
NARROW: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
WEIGHT = "diffusion_pytorch_model.safetensors"


def narrow_config(**changes: Any) -> dict[str, Any]:
    return backbone_config(Preset.PAPER, **{**NARROW, **changes})


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def narrow():
    return build_backbone(narrow_config()).eval()


@pytest.fixture
def official(narrow, tmp_path) -> Path:
    save_official(narrow, tmp_path / "official")
    return tmp_path / "official"


def random_input(size: int = 32) -> tuple[torch.Tensor, int, torch.Tensor]:
    timestep = int(torch.randint(0, 1000, ()))
    return torch.randn(2, CHANNELS, size, size), timestep, torch.randn(2, 1, EMBEDDING_SIZE)


def predict(network, sample: torch.Tensor, timestep: int, embedding: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(sample, timestep, encoder_hidden_states=embedding).sample


def header_of(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file of float32 tensors, as its format describes."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


class TestPresets:
    def test_the_published_one_has_290_million_parameters(self):
        network = build_backbone(Preset.PAPER, "meta")
        assert round(parameter_count(network) / 1e6, 1) == 290.0
        assert network.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 8
        attention_at_128 = network.down_blocks[1].attentions[0].transformer_blocks[0].attn1
        assert attention_at_128.to_q.out_features // attention_at_128.heads == 16

    def test_its_decoder_gives_960_channels_to_the_adapters(self):
        assert sum(decoder_channels(backbone_config("paper"))[1:]) == 960
        assert sum(decoder_channels(backbone_config("student"))[1:]) == 320

    def test_the_student_fits_its_budget(self):
        assert parameter_count(build_backbone(Preset.STUDENT, "meta")) <= 8_000_000

    @pytest.mark.parametrize("preset", [Preset.LITE, Preset.STUDENT])
    def test_no_self_attention_above_32(self, preset):
        network = build_backbone(preset, "meta")
        sizes = [256 >> level for level in range(5)]
        for block, size in zip(network.down_blocks, sizes, strict=True):
            assert getattr(block, "has_cross_attention", False) == (size == 32)
        for block, size in zip(network.up_blocks, reversed(sizes), strict=True):
            assert getattr(block, "has_cross_attention", False) == (size == 32)
        assert network.mid_block.has_cross_attention

    def test_the_published_one_keeps_it_from_128_to_32(self):
        network = build_backbone(Preset.PAPER, "meta")
        assert [getattr(b, "has_cross_attention", False) for b in network.down_blocks] == [0, 1, 1, 1, 0]
        assert [getattr(b, "has_cross_attention", False) for b in network.up_blocks] == [0, 1, 1, 1, 0]

    def test_the_student_depends_on_image_timestep_and_condition(self):
        network = build_backbone(Preset.STUDENT).eval()
        sample, _, embedding = random_input(64)
        before = predict(network, sample, 10, embedding)
        assert before.shape == sample.shape and torch.isfinite(before).all()
        assert not torch.allclose(before, predict(network, sample, 900, embedding), atol=1e-4)
        assert not torch.allclose(before, predict(network, sample, 10, -embedding), atol=1e-6)
        neighbors = sample.clone()
        neighbors[:, 2] += 1
        assert not torch.allclose(before[:, 1], predict(network, neighbors, 10, embedding)[:, 1], atol=1e-4)


class TestOfficialFolder:
    def test_what_was_saved_answers_the_same(self, narrow, official):
        loaded = load_official(official)
        assert loaded.card is None and not loaded.network.training
        inputs = random_input()
        assert torch.equal(predict(loaded.network, *inputs), predict(narrow, *inputs))

    def test_it_is_what_plain_diffusers_writes_and_reads(self, narrow, official, tmp_path):
        from diffusers import UNet2DConditionModel

        inputs = random_input()
        theirs = UNet2DConditionModel.from_pretrained(official, subfolder="unet")
        assert torch.equal(predict(theirs, *inputs), predict(narrow, *inputs))
        narrow.save_pretrained(tmp_path / "theirs" / "unet")
        ours = load_official(tmp_path / "theirs").network
        assert torch.equal(predict(ours, *inputs), predict(narrow, *inputs))

    def test_the_unet_folder_itself_will_do(self, official):
        assert load_official(official / "unet").config == load_official(official).config

    def test_half_precision_comes_back_as_single(self, narrow, tmp_path):
        import copy

        save_official(copy.deepcopy(narrow).half(), tmp_path)
        network = load_official(tmp_path).network
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
        torch.testing.assert_close(network.conv_in.weight, narrow.conv_in.weight, rtol=1e-3, atol=1e-4)

    def test_the_published_keys_and_shapes_are_accepted_and_no_others(self, tmp_path):
        """The real size, without its gigabyte: the keys are judged by the header, and the missing data after it."""
        network = build_backbone(Preset.PAPER, "meta")
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        assert shapes["conv_in.weight"] == (64, 3, 3, 3) and shapes["encoder_hid_proj.weight"] == (1280, 768)
        unet = tmp_path / "unet"
        unet.mkdir()
        (unet / "config.json").write_text(network.to_json_string())
        total = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
        content = header_of(shapes)
        with (unet / WEIGHT).open("wb") as file:  # a hole in place of the values: nothing is written to disk
            file.write(content)
            file.truncate(len(content) + total)
        from LCTfoundLib.networks import backbone

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbone, "_filled", lambda network, state: (network, state))
            patch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)  # the values stay on disk
            loaded, state = load_official(tmp_path).network
        assert state.keys() == loaded.state_dict().keys()
        assert parameter_count(loaded) == parameter_count(network)

    def test_averaged_weights_bring_options_that_do_not_matter(self, official):
        config = json.loads((official / "unet" / "config.json").read_text())
        config |= {"decay": 0.9999, "optimization_step": 5, "switched_off_later": None, "_name_or_path": "x"}
        (official / "unet" / "config.json").write_text(json.dumps(config))
        assert "decay" not in load_official(official).config


class TestDamage:
    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message) as caught:
            load_official(folder)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    def change(self, official: Path, **changes: Any) -> None:
        path = official / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_no_checkpoint_there(self, tmp_path):
        self.check(tmp_path, "no unet/config.json.*give the folder")

    def test_other_widths(self, official):
        self.change(official, block_out_channels=[8, 8, 16, 16, 32])
        self.check(official, "of another shape .*from the same checkpoint")

    def test_another_depth(self, official):
        self.change(official, layers_per_block=1)
        self.check(official, "unexpected")

    def test_a_deeper_configuration(self, official):
        self.change(official, layers_per_block=3)
        self.check(official, "tensors missing")

    @pytest.mark.parametrize("kept", [0, 5, 1000, -10])
    def test_a_cut_file(self, official, kept):
        path = official / "unet" / WEIGHT
        path.write_bytes(path.read_bytes()[:kept])
        self.check(official, "no whole safetensors file.*get it again")

    def test_a_pickle_under_a_false_name(self, official):
        (official / "unet" / WEIGHT).write_bytes(pickle.dumps({"x": list(range(1000))}))
        self.check(official, "no whole safetensors file")

    def test_a_pickle_instead(self, official):
        (official / "unet" / WEIGHT).rename(official / "unet" / "diffusion_pytorch_model.bin")
        self.check(official, "may run code when opened; convert")

    def test_no_weight(self, official):
        (official / "unet" / WEIGHT).unlink()
        self.check(official, "is missing; put it beside")

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, b"\xff\xfe"])
    def test_a_damaged_configuration(self, official, text):
        path = official / "unet" / "config.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.check(official, "cannot be read .*get the checkpoint again")

    def test_a_configuration_that_is_a_list(self, official):
        (official / "unet" / "config.json").write_text("[]")
        self.check(official, "no JSON object")

    def test_another_network(self, official):
        self.change(official, _class_name="AutoencoderKL")
        self.check(official, "AutoencoderKL.*UNet2DConditionModel")

    @pytest.mark.parametrize(
        "changes",
        [
            {"in_channels": 4},
            {"encoder_hid_dim": 1024},
            {"encoder_hid_dim": None, "encoder_hid_dim_type": None},
            {"class_embed_type": "timestep"},
        ],
    )
    def test_another_diffusion_model(self, official, changes):
        self.change(official, **changes)
        self.check(official, f"another diffusion model .*{next(iter(changes))}.*give a backbone")

    def test_an_option_of_a_later_version(self, official):
        self.change(official, rotary=True)
        self.check(official, "rotary.*update diffusers")

    @pytest.mark.parametrize(
        "changes",
        [
            {"down_block_types": ["DownBlock2D", "NoBlock", "DownBlock2D", "DownBlock2D", "DownBlock2D"]},
            {"up_block_types": ["UpBlock2D"]},
            {"block_out_channels": "wide"},
            {"norm_num_groups": 7},
            {"norm_num_groups": 0},
            {"out_channels": -1},
        ],
    )
    def test_a_configuration_of_no_network(self, official, changes):
        self.change(official, **changes)
        self.check(official, "describes no network .*get the checkpoint again")


class TestRegistry:
    @pytest.fixture
    def folder(self, narrow, tmp_path) -> Path:
        parameters = json.loads(json.dumps(narrow_config()))
        card = Card(
            "toy_backbone", "1", "a test", ARCHITECTURE, parameters, (1, 1, 1), (), (DataSource("none", "CC0-1.0"),),
            "Apache-2.0", 0, "", {}, "tests", "all else",
        )  # fmt: skip
        save_weight(narrow.state_dict(), card, tmp_path)
        save_weight(narrow.state_dict(), replace(card, name="toy_net", architecture="UNet3D"), tmp_path)
        parameters["layers_per_block"] = 1
        save_weight(narrow.state_dict(), replace(card, name="toy_wrong"), tmp_path)
        return tmp_path

    def test_a_backbone_with_a_card(self, narrow, folder):
        loaded = load_backbone("toy_backbone", folder)
        assert loaded.card is not None and loaded.config == narrow_config()
        inputs = random_input()
        torch.testing.assert_close(
            predict(loaded.network, *inputs), predict(narrow, *inputs), rtol=2e-2, atol=2e-2
        )  # stored in half precision

    def test_an_official_folder_by_its_path(self, official):
        assert load_backbone(str(official)).card is None

    def test_a_weight_of_another_network(self, folder):
        with pytest.raises(WeightError, match="UNet3D, no backbone"):
            load_backbone("toy_net", folder)

    def test_a_card_that_does_not_fit_its_weight(self, folder):
        with pytest.raises(WeightError, match="'toy_wrong' is not of the network"):
            load_backbone("toy_wrong", folder)
