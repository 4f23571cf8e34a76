"""Adapters: the published heads, saved with a card, refused on another backbone, swapped on one resident backbone."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.adapters import (
    AdapterHost,
    DeepClassifier,
    FeatureRecipe,
    Head,
    LinearProbe,
    LoadedAdapter,
    PixelMLP,
    load_adapter,
    save_adapter,
)
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE, backbone_config, build_backbone
from LCTfoundLib.networks.features import DEEP, FeatureExtractor, Features
from LCTfoundLib.weights.registry import Card, DataSource, list_weights, save_weight, verify

CARD = Card(
    "toy", "1", "a test", "", {}, (1, 1, 1), ("background", "tumor"), (DataSource("none", "CC0-1.0"),), "Apache-2.0",
    0, "", {}, "tests", "all else",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network():
    config = backbone_config(
        "student", block_out_channels=(8, 8, 16, 16, 24), norm_num_groups=4, cross_attention_dim=16
    )
    return build_backbone(config).eval()


@pytest.fixture
def heads(network) -> dict[str, Head]:
    dense = FeatureRecipe.of(network, (1, 2, 3, 4), (0, 50))
    deep = FeatureRecipe.of(network, (DEEP,), (0, 50))
    return {
        "pixels": PixelMLP(dense, 2, (12, 6)).eval(),
        "slice": DeepClassifier(deep, 3, 10).eval(),
        "probe": LinearProbe(deep, 2).eval(),
    }


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 32) * 2 - 1


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(1, 1, EMBEDDING_SIZE)


def random_features(recipe: FeatureRecipe, n: int = 2) -> Features:
    sizes = {DEEP: (2, 3), 0: (4, 6), 1: (4, 6), 2: (8, 12), 3: (16, 24), 4: (16, 24)}
    return Features(
        recipe.timesteps,
        {
            block: torch.randn(n, len(recipe.timesteps), width, *sizes[block])
            for block, width in zip(recipe.blocks, recipe.widths, strict=True)
        },
    )


class TestHeads:
    def test_the_pixel_head_equals_an_mlp_on_the_concatenation(self):
        recipe = FeatureRecipe((1, 2, 3, 4), (0, 50, 100), (24, 16, 8, 4))
        head = PixelMLP(recipe, 5, (12, 6)).train()
        head(random_features(recipe), (16, 24))  # statistics of the normalization that differ from 0 and 1
        head.eval()
        features = random_features(recipe)
        with torch.no_grad():
            naive = head.rest(head.first(features.concatenated((16, 24))))
            torch.testing.assert_close(head(features, (16, 24)), naive, rtol=1e-4, atol=1e-4)
        assert naive.shape == (2, 5, 16, 24)

    def test_the_published_pixel_head_sees_3840_channels(self):
        network = build_backbone("paper", "meta")
        assert FeatureRecipe.of(network, (1, 2, 3, 4), (0, 50, 100, 150)).channels == 3840

    def test_the_slice_head_is_the_published_chain(self):
        recipe = FeatureRecipe((DEEP,), (0, 50), (24,))
        head = DeepClassifier(recipe, 3, 10).eval()
        features = random_features(recipe)
        with torch.no_grad():
            vectors = []
            for step in (0, 1):
                vector = head.reduce[step](features.deep[:, step]).mean(dim=(2, 3))
                vectors.append(vector / vector.norm(dim=1, keepdim=True))
            torch.testing.assert_close(head(features), head.mlp(torch.cat(vectors, dim=1)))

    def test_the_probe_is_linear_in_the_features(self):
        recipe = FeatureRecipe((DEEP, 2), (0, 50), (24, 8))
        head = LinearProbe(recipe, 4).eval()
        features = random_features(recipe)
        doubled = Features(recipe.timesteps, {block: 2 * maps for block, maps in features.maps.items()})
        with torch.no_grad():
            torch.testing.assert_close(head(doubled) - head(features), head(features) - head.linear.bias)

    @pytest.mark.parametrize("kind", [PixelMLP, DeepClassifier, LinearProbe])
    def test_every_parameter_learns(self, kind):
        torch.manual_seed(int(torch.randint(0, 2**31, ())))
        recipe = FeatureRecipe((DEEP,), (0, 50), (24,))
        head = kind(recipe, 3).train()
        logits = head(random_features(recipe, 4), (8, 12))
        logits.square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
        assert next(head.parameters()).grad.abs().sum() > 0

    def test_features_in_half_precision_will_do(self, heads):
        for head in heads.values():
            features = random_features(head.recipe)
            half = Features(features.timesteps, {block: maps.bfloat16() for block, maps in features.maps.items()})
            with torch.no_grad():
                torch.testing.assert_close(head(half, (16, 24)), head(features, (16, 24)), rtol=0.1, atol=0.1)


class TestFiles:
    def test_what_was_saved_answers_the_same(self, heads, tmp_path):
        for name, head in heads.items():
            written = save_adapter(head, replace(CARD, name=name), tmp_path)
            loaded = load_adapter(name, tmp_path)
            assert loaded.card == written and written.architecture == type(head).__name__
            assert loaded.head.recipe == head.recipe and not loaded.head.training
            features = random_features(head.recipe)
            with torch.no_grad():
                torch.testing.assert_close(
                    loaded.head(features, (16, 24)), head(features, (16, 24)), rtol=2e-2, atol=2e-2
                )  # stored in half precision
        assert [(entry.name, verify(entry)) for entry in list_weights([tmp_path])] == [
            ("pixels", ""), ("probe", ""), ("slice", "")
        ]  # fmt: skip

    def test_the_published_pixel_head_is_a_small_file(self, tmp_path):
        recipe = FeatureRecipe.of(build_backbone("paper", "meta"), (1, 2, 3, 4), (0, 50, 100, 150))
        save_adapter(PixelMLP(recipe, 2), CARD, tmp_path)
        assert os.path.getsize(tmp_path / "toy.safetensors") < 1_100_000

    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message) as caught:
            load_adapter("toy", folder)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    @pytest.fixture
    def folder(self, heads, tmp_path) -> Path:
        save_adapter(heads["pixels"], CARD, tmp_path)
        return tmp_path

    def rewrite(self, folder: Path, **parameters: object) -> None:
        card = json.loads((folder / "toy.json").read_text())
        card["architecture_parameters"] |= parameters
        (folder / "toy.json").write_text(json.dumps(card))

    def test_a_weight_of_no_adapter(self, tmp_path):
        save_weight({"x": torch.zeros(1)}, replace(CARD, architecture="UNet3D"), tmp_path)
        self.check(tmp_path, "UNet3D, no adapter; give the name of one")

    @pytest.mark.parametrize(
        "parameters",
        [
            {"head": {"classes": 7, "hidden": [12, 6]}},
            {"head": {"classes": 2, "hidden": [12, 6], "depth": 3}},
            {"head": {"classes": "two"}},
            {"head": None},
            {"features": {"blocks": [1], "timesteps": [0, 50], "widths": [16, 8]}},
            {"features": {"blocks": [], "timesteps": [], "widths": []}},
            {"features": [1]},
        ],
    )
    def test_a_card_that_does_not_fit(self, folder, parameters):
        self.rewrite(folder, **parameters)
        self.check(folder, "not what its card describes .*get it again")

    def test_a_cut_file(self, folder):
        path = folder / "toy.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        self.check(folder, "damaged; get it again")


class TestHost:
    @pytest.fixture
    def host(self, network, heads) -> AdapterHost:
        host = AdapterHost(network)
        for name, head in heads.items():
            host.add(name, LoadedAdapter(head, CARD))
        return host

    def test_adapters_swap_on_one_backbone(self, network, host, heads, images, embedding):
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        for name in ("pixels", "slice", "probe", "pixels", "slice"):
            head = heads[name]
            extract = FeatureExtractor(network, head.recipe.blocks)
            features = extract(images, embedding, (0, 50), torch.Generator().manual_seed(0))
            with torch.no_grad():
                torch.testing.assert_close(host.run(name, images, embedding), head(features, (16, 32)))
        assert host.run("pixels", images, embedding).shape == (2, 2, 16, 32)
        assert host.run("slice", images, embedding).shape == (2, 3)
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[key])

    def test_adapters_of_the_same_features_share_them(self, host, images, embedding, monkeypatch):
        host.run("slice", images, embedding)
        monkeypatch.setattr(host.network.conv_in, "forward", lambda _: pytest.fail("the backbone ran again"))
        host.run("probe", images.clone(), embedding.clone())

    def test_a_tensor_filled_anew_is_seen(self, host, images, embedding):
        first = host.run("slice", images, embedding)
        images.neg_()
        assert not torch.allclose(host.run("slice", images, embedding), first, atol=1e-6)

    def test_seed_and_condition_are_seen(self, host, images, embedding):
        first = host.run("pixels", images, embedding, seed=1)
        assert torch.equal(host.run("pixels", images, embedding, seed=1), first)
        assert not torch.allclose(host.run("pixels", images, embedding, seed=2), first, atol=1e-6)
        assert not torch.allclose(host.run("pixels", images, -embedding, seed=1), first, atol=1e-7)

    def test_loaded_once_and_removed(self, network, heads, tmp_path, images, embedding):
        save_adapter(heads["slice"], CARD, tmp_path)
        host = AdapterHost(network)
        host.load("toy", tmp_path)
        (tmp_path / "toy.safetensors").unlink()
        host.load("toy", tmp_path)  # resident: the file is not needed again
        assert host.names == ["toy"] and host.run("toy", images, embedding).shape == (2, 3)
        host.remove("toy")
        host.remove("toy")
        with pytest.raises(KeyError):
            host.run("toy", images, embedding)

    @pytest.mark.parametrize(("block", "width"), [(DEEP, 1024), (1, 8), (7, 8), (-3, 24)])
    def test_an_adapter_of_another_backbone_is_refused(self, network, block, width):
        host = AdapterHost(network)
        with pytest.raises(WeightError, match="load the backbone its card names"):
            host.add("x", LoadedAdapter(LinearProbe(FeatureRecipe((block,), (0,), (width,)), 2), CARD))
        assert host.names == []
