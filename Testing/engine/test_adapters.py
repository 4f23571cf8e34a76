"""Adapters of every kind: one format, one loader, one host; refused on another backbone, swapped without a trace."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LCTfoundLib.errors import WeightError
from LCTfoundLib.networks.adapter_base import (
    Adapter,
    BackboneShape,
    fingerprint,
    plain_parameters,
    with_tensors,
)
from LCTfoundLib.networks.adapters import (
    AdapterHost,
    ColdRestorer,
    DeepClassifier,
    FeatureRecipe,
    Head,
    ImageCondition,
    LinearProbe,
    LoadedAdapter,
    OutputLayer,
    PixelMLP,
    load_adapter,
    save_adapter,
    traced_features,
)
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE, backbone_config, build_backbone, parameter_count
from LCTfoundLib.networks.features import DEEP, FeatureExtractor, Features
from LCTfoundLib.networks.lora import CONVOLUTIONS, active_lora, add_lora, save_lora, use_lora
from LCTfoundLib.weights.registry import Card, DataSource, list_weights, save_weight, verify
from Testing.engine.toy_backbones import two_levels
from training.adapters.fit import PROGNOSIS, WHOLE_LUNG, Method, Settings, classification_loss, fit, pixel_loss

CARD = Card(
    "toy", "1", "a test", "", {}, (1, 1, 1), ("background", "tumor"), (DataSource("none", "CC0-1.0"),), "Apache-2.0",
    0, "", {}, "tests", "all else",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def a_backbone(**changes: object):
    config = backbone_config(
        "student",
        **{"block_out_channels": (8, 8, 16, 16, 24), "norm_num_groups": 4, "cross_attention_dim": 16} | changes,
    )
    return build_backbone(config).eval()


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


@pytest.fixture(scope="module")
def network():
    return a_backbone()


@pytest.fixture(scope="module")
def shallow():
    return two_levels((16, 16), groups=4)


def a_trained(adapter: Adapter) -> Adapter:
    """With values as after a training; many start at zero, and zeros cannot be told apart."""
    for name, parameter in adapter.named_parameters():
        if not name.startswith("tuned."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapter.eval()


def tuned(adapter: Adapter, network, by: float = 0.003) -> Adapter:
    """With a backbone of its own that differs a little, as after a fine-tuning."""
    adapter.tune(network)
    for parameter in adapter.tuned.values():
        parameter.data += by * torch.randn_like(parameter)
    return adapter.eval()


def bits(network) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in plain_parameters(network).items()}


def assert_same_bits(network, before: dict[str, torch.Tensor]) -> None:
    after = plain_parameters(network)
    assert after.keys() == before.keys() and all(torch.equal(tensor, before[key]) for key, tensor in after.items())


#: One of every kind, on the frozen backbone and on a tuned one.
KINDS: dict[str, Callable[..., Adapter]] = {
    "pixels": lambda network: PixelMLP(FeatureRecipe.of(network, (1, 2, 3, 4), (0, 50)), 2, (12, 6)),
    "slice": lambda network: DeepClassifier(FeatureRecipe.of(network, (DEEP,), (0, 50)), 3, 10),
    "probe": lambda network: LinearProbe(FeatureRecipe.of(network, (DEEP,), (0, 50)), 2),
    "layer": lambda network: OutputLayer(BackboneShape.of(network), 4),
    "restore": lambda network: ColdRestorer(BackboneShape.of(network), 8, (0, 20), "measured"),
    "generate": lambda network: ImageCondition(BackboneShape.of(network), 8, 2),
    "tuned_layer": lambda network: tuned(OutputLayer(BackboneShape.of(network), 4), network),
    "tuned_slice": lambda network: tuned(DeepClassifier(FeatureRecipe.of(network, (DEEP,), (0,)), 2, 10), network),
    "tuned_generate": lambda network: tuned(ImageCondition(BackboneShape.of(network), 8, 2), network),
}
SHAPES = {
    "pixels": (2, 2, 16, 32), "slice": (2, 3), "probe": (2, 2), "layer": (2, 4, 16, 32), "restore": (2, 1, 16, 32),
    "generate": (2, 3, 16, 32), "tuned_layer": (2, 4, 16, 32), "tuned_slice": (2, 2), "tuned_generate": (2, 3, 16, 32),
}  # fmt: skip


def one_of(kind: str, network) -> Adapter:
    return a_trained(KINDS[kind](network))


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


class TestTuning:
    def test_other_tensors_stand_in_for_a_call_only(self, network, images, embedding):
        before, other = bits(network), a_backbone()
        with torch.no_grad():
            plain = network(images, 5, encoder_hidden_states=embedding.expand(2, -1, -1)).sample
            wanted = other(images, 5, encoder_hidden_states=embedding.expand(2, -1, -1)).sample
            found = with_tensors(
                network,
                plain_parameters(other),
                lambda n: n(images, 5, encoder_hidden_states=embedding.expand(2, -1, -1)).sample,
            )
            again = network(images, 5, encoder_hidden_states=embedding.expand(2, -1, -1)).sample
        assert torch.equal(found, wanted) and torch.equal(again, plain) and not torch.equal(found, plain)
        assert_same_bits(network, before)

    def test_an_error_in_the_call_leaves_the_backbone_alone(self, network):
        before = bits(network)
        with pytest.raises(ZeroDivisionError):
            with_tensors(network, plain_parameters(a_backbone()), lambda _: 1 / 0)
        assert_same_bits(network, before)

    def test_the_output_layer_equals_a_backbone_with_it_built_in(self, network, images, embedding):
        adapter = one_of("tuned_layer", network)
        built_in = copy.deepcopy(network)
        built_in.conv_out = adapter.conv_out
        state = {key.replace("/", "."): tensor for key, tensor in adapter.tuned.items()}
        missing = built_in.load_state_dict(state, strict=False)
        assert sorted(missing.missing_keys) == ["conv_out.bias", "conv_out.weight"] and not missing.unexpected_keys
        with torch.no_grad():
            wanted = built_in(images, 0, encoder_hidden_states=embedding.expand(2, -1, -1)).sample
            torch.testing.assert_close(adapter.run(network, images, embedding, images), wanted)

    def test_traced_features_are_the_extractors(self, network, images, embedding):
        recipe = FeatureRecipe.of(network, (DEEP, 1, 3), (0, 50, 150))
        noise = torch.randn_like(images)
        found = traced_features(network, recipe, images, embedding.expand(2, -1, -1), noise)
        wanted = FeatureExtractor(network, recipe.blocks)(images, embedding, recipe.timesteps, noise=noise)
        for block in recipe.blocks:
            torch.testing.assert_close(found.maps[block], wanted.maps[block], rtol=1e-4, atol=1e-5)

    def test_a_full_fine_tune_learns_a_segmentation_and_comes_back_from_its_file(self, shallow, embedding, tmp_path):
        before = bits(shallow)
        adapter = OutputLayer(BackboneShape.of(shallow), 2)
        adapter.tune(shallow)
        settings = replace(WHOLE_LUNG, rate=5e-3, epochs=1)
        losses = fit(adapter, shallow, [blobs(embedding) for _ in range(20)], pixel_loss, settings)
        assert_same_bits(shallow, before)
        moved = [key for key, tensor in adapter.tuned.items() if not torch.equal(tensor, before[key.replace("/", ".")])]
        assert len(moved) > 0.9 * len(adapter.tuned)  # all weights are tuned; some biases have no gradient
        save_adapter(adapter, shallow, CARD, tmp_path)
        host = AdapterHost(shallow)
        host.load("toy", tmp_path)
        test = blobs(embedding)
        found = host.run("toy", test["images"], embedding)
        with torch.no_grad():
            trained = adapter.run(shallow, test["images"], embedding, test["images"])
        torch.testing.assert_close(found, trained, rtol=1e-2, atol=1e-2)
        right = (found.argmax(1) == test["target"]).float().mean()
        print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {right:.3f} of the pixels right")
        assert losses[-1] < 0.6 * losses[0] and right > 0.85

    def test_a_classifier_is_tuned_too(self, shallow, embedding, tmp_path):
        before = bits(shallow)
        adapter = DeepClassifier(FeatureRecipe.of(shallow, (DEEP,), (0,)), 2, 16)
        adapter.tune(shallow)
        settings = replace(PROGNOSIS, method=Method.ADAMW, rate=5e-3, epochs=1)
        losses = fit(adapter, shallow, [bright_or_dark(embedding) for _ in range(30)], classification_loss, settings)
        assert_same_bits(shallow, before)
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
        assert not torch.equal(adapter.tuned["conv_in/weight"], before["conv_in.weight"])
        assert torch.equal(adapter.tuned["conv_out/weight"], before["conv_out.weight"])  # comes after the deep block

    def test_a_difference_keeps_more_of_the_tuning_than_the_weights_would(self, network, tmp_path):
        adapter = tuned(OutputLayer(BackboneShape.of(network), 2), network, by=1e-3)
        save_adapter(adapter, network, CARD, tmp_path)
        loaded = load_adapter("toy", network, tmp_path).adapter
        begun, lost, lost_whole = bits(network), [], []
        for key, tensor in adapter.tuned.items():
            change = (tensor - begun[key.replace("/", ".")]).norm()
            lost.append((loaded.tuned[key] - tensor).norm() / change)
            lost_whole.append((tensor.half().float() - tensor).norm() / change)
        assert max(lost) < 1e-3 < 1e-2 < sum(lost_whole) / len(lost_whole)


def blobs(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Smooth random slices with some noise, and where they are bright."""
    smooth = torch.nn.functional.interpolate(torch.randn(4, 1, 4, 4), (16, 16), mode="bicubic", align_corners=True)
    noisy = smooth.expand(-1, 3, -1, -1) + 0.1 * torch.randn(4, 3, 16, 16)
    return {"images": noisy, "target": (smooth[:, 0] > 0).long(), "embedding": embedding}


def bright_or_dark(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    target = torch.randint(0, 2, (8,))
    level = (target.float() - 0.5).view(-1, 1, 1, 1)
    return {"images": level + 0.3 * torch.randn(8, 3, 16, 16), "target": target, "embedding": embedding}


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_was_saved_answers_the_same(self, kind, network, images, embedding, tmp_path):
        adapter = one_of(kind, network)
        written = save_adapter(adapter, network, replace(CARD, name=kind), tmp_path)
        loaded = load_adapter(kind, network, tmp_path)
        assert loaded.card == written and type(loaded.adapter) is type(adapter)
        assert written.architecture == type(adapter).__name__
        assert written.architecture_parameters.keys() == {"needs", "arguments", "backbone"}
        assert loaded.adapter.needs == adapter.needs and loaded.adapter.arguments == adapter.arguments
        assert not loaded.adapter.training and not any(p.requires_grad for p in loaded.adapter.parameters())
        noise = torch.randn_like(images)
        with torch.no_grad():
            found, wanted = (a.run(network, images, embedding, noise) for a in (loaded.adapter, adapter))
        assert found.shape == SHAPES[kind]
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)  # stored in half precision
        [entry] = list_weights([tmp_path])
        assert entry.name == kind and verify(entry) == ""

    def test_the_published_pixel_head_is_a_small_file(self, tmp_path):
        network = build_backbone("paper", "meta")
        head = PixelMLP(FeatureRecipe.of(network, (1, 2, 3, 4), (0, 50, 100, 150)), 2)
        save_weight(head.state_dict(), CARD, tmp_path)
        assert os.path.getsize(tmp_path / "toy.safetensors") < 1_100_000

    @pytest.mark.parametrize("preset", ["paper", "student"])
    def test_on_a_frozen_backbone_every_adapter_is_a_small_file(self, preset):
        network = build_backbone(preset, "meta")
        shape = BackboneShape.of(network)
        for adapter in (OutputLayer(shape, 22), ColdRestorer(shape), ImageCondition(shape)):
            values = sum(parameter.numel() for parameter in adapter.parameters())
            assert 2 * values < 4_000_000  # bytes in float16; the backbones have 580 and 16 million
            assert values < 0.15 * parameter_count(network)

    def check(self, network, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message) as caught:
            load_adapter("toy", network, folder)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    @pytest.fixture
    def folder(self, network, tmp_path) -> Path:
        save_adapter(one_of("pixels", network), network, CARD, tmp_path)
        return tmp_path

    def rewrite(self, folder: Path, **parameters: object) -> None:
        card = json.loads((folder / "toy.json").read_text())
        card["architecture_parameters"] |= parameters
        (folder / "toy.json").write_text(json.dumps(card))

    def test_a_weight_of_no_adapter(self, network, tmp_path):
        save_weight({"x": torch.zeros(1)}, replace(CARD, architecture="UNet3D"), tmp_path)
        self.check(network, tmp_path, "UNet3D, no adapter; give the name of one .*LoRA")

    @pytest.mark.parametrize(
        "parameters",
        [
            {"arguments": {"classes": 7, "hidden": [12, 6]}},
            {"arguments": {"classes": 2, "hidden": [12, 6], "depth": 3}},
            {"arguments": {"classes": "two"}},
            {"arguments": None},
            {"needs": {"blocks": [1], "timesteps": [0, 50], "widths": [16, 8]}},
            {"needs": {"blocks": [], "timesteps": [], "widths": []}},
            {"needs": [1]},
        ],
    )
    def test_a_card_that_does_not_fit(self, network, folder, parameters):
        self.rewrite(folder, **parameters)
        self.check(network, folder, "not what its card describes .*get it again")

    @pytest.mark.parametrize("kind", ["layer", "restore", "generate"])
    @pytest.mark.parametrize(
        "parameters",
        [
            {"arguments": {"classes": 0, "width": 8, "steps": 0, "timesteps": [1000]}},
            {"needs": {"widths": [], "layers": 1}},
            {"needs": {"widths": [8, 8, 16, 16, 24]}},
            {"arguments": [1]},
        ],
    )
    def test_a_card_of_another_kind_that_does_not_fit(self, network, kind, parameters, tmp_path):
        save_adapter(one_of(kind, network), network, CARD, tmp_path)
        self.rewrite(tmp_path, **parameters)
        self.check(network, tmp_path, "not what its card describes .*get it again")

    def test_tuned_tensors_that_the_backbone_does_not_have(self, network, tmp_path):
        written = save_adapter(one_of("layer", network), network, CARD, tmp_path)
        state = one_of("layer", network).state_dict()
        for extra in ({"tuned.conv_in/strange": torch.zeros(1)}, {"tuned.conv_in/weight": torch.zeros(1)}):
            save_weight(state | extra, written, tmp_path)
            self.check(network, tmp_path, "not what its card describes .*conv_in.*get it again")

    def test_a_cut_file(self, network, folder):
        path = folder / "toy.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        self.check(network, folder, "damaged; get it again")

    @pytest.mark.parametrize("kind", ["probe", "layer", "restore", "generate", "tuned_layer"])
    def test_one_of_another_backbone(self, network, kind, tmp_path):
        """Of other widths, and of the same shape with other weights."""
        save_adapter(one_of(kind, network), network, CARD, tmp_path)
        self.check(a_backbone(block_out_channels=(8, 8, 16, 16, 32)), tmp_path, "needs a backbone with .*card names")
        self.check(a_backbone(), tmp_path, "another backbone of the same shape; load the backbone its card names")


class TestFingerprint:
    def test_it_knows_the_weights_and_not_how_they_lie(self, network):
        other = copy.deepcopy(network)
        assert fingerprint(other) == fingerprint(network)
        assert fingerprint(other.to(memory_format=torch.channels_last)) == fingerprint(network)
        assert fingerprint(other.half()) == fingerprint(network)
        assert fingerprint(a_backbone()) != fingerprint(network)

    def test_one_step_of_training_is_seen(self, network):
        other = copy.deepcopy(network)
        with torch.no_grad():
            other.mid_block.resnets[0].conv1.weight += 1e-3
        assert fingerprint(other) != fingerprint(network)

    def test_low_rank_adapters_do_not_change_it(self, network):
        pytest.importorskip("peft")
        other = copy.deepcopy(network)
        add_lora(other, "x", rank=2, targets=CONVOLUTIONS)
        assert fingerprint(other) == fingerprint(network)


class TestHost:
    @pytest.fixture
    def host(self, network) -> AdapterHost:
        host = AdapterHost(network)
        for kind in KINDS:
            host.add(kind, LoadedAdapter(one_of(kind, network)))
        return host

    def test_swapped_in_any_order_they_answer_as_fresh_loads_do(self, network, images, embedding, rng, tmp_path):
        pytest.importorskip("peft")
        resident = copy.deepcopy(network)
        lender = copy.deepcopy(network)
        add_lora(lender, "lora", rank=2, targets=CONVOLUTIONS)
        for parameter in lender.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        save_lora(lender, "lora", replace(CARD, name="lora"), tmp_path)
        for kind in KINDS:
            save_adapter(one_of(kind, network), network, replace(CARD, name=kind), tmp_path)

        def fresh(kind: str, lora: str | None) -> torch.Tensor:
            host = AdapterHost(copy.deepcopy(network))
            for name in (kind, lora) if lora else (kind,):
                host.load(name, tmp_path)
            return host.run(kind, images, embedding, lora=lora)

        wanted = {(kind, lora): fresh(kind, lora) for kind in ("probe", "tuned_layer") for lora in (None, "lora")}
        wanted |= {(kind, None): fresh(kind, None) for kind in KINDS}
        assert not torch.equal(wanted["probe", "lora"], wanted["probe", None])
        before, host = bits(network), AdapterHost(resident)
        for name in (*KINDS, "lora"):
            host.load(name, tmp_path)
        for path in tmp_path.iterdir():
            path.unlink()  # from here on nothing can be loaded
        order = list(wanted) * 2
        rng.shuffle(order)
        for kind, lora in order:
            assert torch.equal(host.run(str(kind), images, embedding, lora=lora), wanted[kind, lora]), (kind, lora)
        assert_same_bits(resident, before)
        assert active_lora(resident) is None

    def test_a_training_step_is_not_disturbed_by_the_host(self, network, images, embedding):
        """The low-rank adapter that worked before works after."""
        pytest.importorskip("peft")
        resident = copy.deepcopy(network)
        host = AdapterHost(resident)
        host.add("probe", LoadedAdapter(one_of("probe", resident)))
        plain = host.run("probe", images, embedding)
        add_lora(resident, "training", rank=2, targets=CONVOLUTIONS)
        assert active_lora(resident) == "training"
        assert torch.equal(host.run("probe", images, embedding), plain)
        assert active_lora(resident) == "training"
        use_lora(resident, None)

    def test_heads_of_the_same_features_share_them(self, host, images, embedding, monkeypatch):
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

    @pytest.mark.parametrize("kind", ["pixels", "restore", "tuned_generate"])
    def test_the_answer_does_not_depend_on_the_batch(self, network, kind, embedding):
        images = torch.rand(3, 3, 16, 16) * 2 - 1
        answers = []
        for batch in (1, 2, 3):
            host = AdapterHost(network, batch=batch)
            torch.manual_seed(3)
            host.add(kind, LoadedAdapter(one_of(kind, network)))
            answers.append(host.run(kind, images, embedding, seed=7))
        # Generation multiplies float32's rounding of the noise predicted at timestep 999 by 156.
        tolerance = 5e-3 if kind == "tuned_generate" else 1e-4
        for other in answers[1:]:
            torch.testing.assert_close(other, answers[0], rtol=1e-3, atol=tolerance)

    def test_half_precision_will_do(self, network, images, embedding):
        for kind in ("layer", "restore"):
            adapter = one_of(kind, network)
            single, half = AdapterHost(network), AdapterHost(network, dtype=torch.bfloat16)
            for host in (single, half):
                host.add(kind, LoadedAdapter(adapter))
            found, wanted = half.run(kind, images, embedding), single.run(kind, images, embedding)
            assert found.dtype == torch.float32
            assert (found - wanted).norm() < 0.05 * wanted.norm()

    def test_loaded_once_and_removed(self, network, tmp_path, images, embedding):
        written = save_adapter(one_of("slice", network), network, CARD, tmp_path)
        host = AdapterHost(network)
        host.load("toy", tmp_path)
        (tmp_path / "toy.safetensors").unlink()
        host.load("toy", tmp_path)  # resident: the file is not needed again
        assert host.names == ["toy"] and host.card("toy") == written
        assert host.run("toy", images, embedding).shape == (2, 3)
        host.remove("toy")
        host.remove("toy")
        with pytest.raises(KeyError):
            host.run("toy", images, embedding)

    @pytest.mark.parametrize(("block", "width"), [(DEEP, 1024), (1, 8), (7, 8), (-3, 24)])
    def test_an_adapter_of_another_backbone_is_refused(self, network, block, width):
        host = AdapterHost(network)
        with pytest.raises(WeightError, match="load the backbone its card names"):
            host.add("x", LoadedAdapter(LinearProbe(FeatureRecipe((block,), (0,), (width,)), 2)))
        assert host.names == []

    def test_one_loaded_for_another_backbone_is_refused(self, network, tmp_path):
        save_adapter(one_of("layer", network), network, CARD, tmp_path)
        loaded = load_adapter("toy", network, tmp_path)
        with pytest.raises(WeightError, match="another backbone of the same shape"):
            AdapterHost(a_backbone()).add("toy", loaded)


class TestFit:
    def test_the_rates_are_the_published_ones(self):
        falling = Settings(Method.SGD, 1e-3, epochs=10, tenths=(4, 8))
        assert [round(falling.factor(0, epoch, 100), 9) for epoch in (0, 3, 4, 7, 8)] == [1, 1, 0.1, 0.1, 0.01]
        cosine = Settings(Method.ADAM, 1e-3, steps=100, cosine=True, warmup=10)
        assert cosine.factor(0, 0, 100) == pytest.approx(0.1) and cosine.factor(50, 0, 100) == pytest.approx(0.5)
        with pytest.raises(ValueError):
            Settings(Method.ADAM, 1e-3, epochs=1, steps=1)

    def test_steps_and_epochs_are_counted_and_reported(self, shallow, embedding):
        batches, seen = [bright_or_dark(embedding) for _ in range(3)], []
        adapter = LinearProbe(FeatureRecipe.of(shallow, (DEEP,), (0,)), 2)
        settings = Settings(Method.ADAMW, 1e-2, epochs=2)
        losses = fit(adapter, shallow, batches, classification_loss, settings, report=lambda *told: seen.append(told))
        assert len(losses) == 6 and seen == list(enumerate(losses))
        assert len(fit(adapter, shallow, batches, classification_loss, replace(settings, epochs=0, steps=4))) == 4
        with pytest.raises(ValueError, match="no batches"):
            fit(adapter, shallow, [], classification_loss, settings)

    def test_the_same_seed_gives_the_same_adapter(self, shallow, embedding):
        batches = [bright_or_dark(embedding) for _ in range(2)]
        adapters = [LinearProbe(FeatureRecipe.of(shallow, (DEEP,), (100,)), 2) for _ in range(2)]
        adapters[1].load_state_dict(adapters[0].state_dict())
        settings = Settings(Method.ADAMW, 1e-2, epochs=1)
        first, second = (fit(a, shallow, batches, classification_loss, settings, seed=4) for a in adapters)
        assert first == second and torch.equal(adapters[0].linear.weight, adapters[1].linear.weight)

    def test_a_loss_that_is_not_finite_ends_it(self, shallow, embedding):
        batch = bright_or_dark(embedding)
        batch["images"][0, 0, 0, 0] = float("nan")
        adapter = LinearProbe(FeatureRecipe.of(shallow, (DEEP,), (0,)), 2)
        with pytest.raises(FloatingPointError, match="step 0 .*smaller learning rate"):
            fit(adapter, shallow, [batch], classification_loss, Settings(Method.ADAMW, 1e-2, epochs=1))
