"""Image-conditioned generation: the branch beside the backbone, the sampling, and that it learns to be guided."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from LCTfoundLib.networks.adapter_base import BackboneShape, plain_parameters
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE, backbone_config, build_backbone
from LCTfoundLib.networks.features import Prediction
from LCTfoundLib.networks.image_condition import ImageCondition
from LCTfoundLib.networks.sampling import timesteps
from LCTfoundLib.networks.tuned import OutputLayer
from Testing.engine.toy_backbones import two_levels
from training.adapters.fit import VIRTUAL_CTA, fit, generation_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


@pytest.fixture(scope="module")
def network():
    return two_levels()


@pytest.fixture(scope="module")
def embedding() -> torch.Tensor:
    return torch.randn(1, 1, EMBEDDING_SIZE)


@pytest.fixture
def slices() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16) * 2 - 1


def a_trained(network, steps: int = 3) -> ImageCondition:
    adapter = ImageCondition(BackboneShape.of(network), 8, steps)
    for parameter in adapter.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return adapter.eval()


class TestBranch:
    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("widths", [(8, 8, 16, 16, 24), (8, 16)])
    def test_it_has_a_map_for_each_that_the_decoder_gets(self, widths, layers, embedding):
        count = len(widths)
        config = backbone_config(
            "student",
            block_out_channels=widths,
            layers_per_block=layers,
            norm_num_groups=4,
            cross_attention_dim=16,
            down_block_types=("DownBlock2D",) * count,
            up_block_types=("UpBlock2D",) * count,
        )
        backbone = build_backbone(config).eval()
        shape = BackboneShape.of(backbone)
        seen = []

        def spy(module, inputs, named):
            seen.extend(named["res_hidden_states_tuple"][::-1])

        for block in backbone.up_blocks:
            block.register_forward_pre_hook(spy, with_kwargs=True)
        with torch.no_grad():
            backbone(torch.randn(1, 3, 16, 16), 3, encoder_hidden_states=embedding)
        found = [tuple(maps.shape[1:]) for maps in reversed(seen)]
        assert [(width, 16 >> level, 16 >> level) for level, width in shape.skips] == found
        assert (
            a_trained(backbone)
            .run(backbone, torch.randn(1, 3, 16, 16), embedding, torch.randn(1, 3, 16, 16))
            .isfinite()
            .all()
        )

    def test_before_any_training_the_backbone_answers_as_if_alone(self, network, slices, embedding):
        adapter, noisy = ImageCondition(BackboneShape.of(network)), torch.randn_like(slices)
        timesteps, told = torch.tensor([0, 700]), embedding.expand(2, -1, -1)
        with torch.no_grad():
            alone = network(noisy, timesteps, encoder_hidden_states=told).sample
            assert torch.equal(adapter.predict(network, noisy, timesteps, told, slices), alone)

    def test_slice_and_timestep_count(self, network, slices, embedding):
        adapter, noisy, told = a_trained(network), torch.randn_like(slices), embedding.expand(2, -1, -1)
        steps = torch.tensor([10, 10])
        with torch.no_grad():
            plain, other = (adapter.predict(network, noisy, steps, told, given) for given in (slices, -slices))
            assert not torch.allclose(plain, other, atol=1e-4)
            # The branch's own part knows the step too, not only the backbone.
            near, far = (adapter.branch(slices, torch.randn(2, 64)) for _ in range(2))
            assert not torch.allclose(near[1], far[1], atol=1e-4)

    def test_every_value_learns_and_none_of_the_backbone(self, network, slices, embedding):
        frozen = copy.deepcopy(network).requires_grad_(False)
        adapter = a_trained(network).train()
        batch = {"condition": slices, "wanted": -slices, "embedding": embedding}
        generation_loss(adapter, frozen, batch, torch.Generator().manual_seed(0)).backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert all(parameter.grad is None for parameter in frozen.parameters())

    @pytest.mark.parametrize("steps", [0, 1001])
    def test_steps_that_the_noise_does_not_have(self, network, steps):
        with pytest.raises(ValueError, match="steps"):
            ImageCondition(BackboneShape.of(network), 8, steps)

    def test_another_adapter_generates_nothing(self, network, slices, embedding):
        batch = {"condition": slices, "wanted": slices, "embedding": embedding}
        with pytest.raises(TypeError, match="OutputLayer generates nothing"):
            generation_loss(OutputLayer(BackboneShape.of(network), 2), network, batch, torch.Generator())


class TestSampling:
    def test_it_is_ddim(self, network, slices, embedding):
        """Against a loop in double precision; the estimate of the clean slice is kept within -1..1."""
        adapter, noise, told = a_trained(network, 6), torch.randn_like(slices), embedding.expand(2, -1, -1)
        betas = np.linspace(1e-4, 0.02, 1000)
        kept, steps, x = np.cumprod(1 - betas), timesteps(6), noise.double()
        with torch.no_grad():
            for step, below in zip(steps, [*steps[1:], None], strict=True):
                predicted = adapter.predict(network, x.float(), torch.tensor([step, step]), told, slices).double()
                clean = ((x - (1 - kept[step]) ** 0.5 * predicted) / kept[step] ** 0.5).clamp(-1, 1)
                predicted = (x - kept[step] ** 0.5 * clean) / (1 - kept[step]) ** 0.5
                left = 1.0 if below is None else kept[below]
                x = left**0.5 * clean + (1 - left) ** 0.5 * predicted
            found = adapter.run(network, slices, embedding, noise)
        torch.testing.assert_close(found, x.float(), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("prediction", Prediction)
    def test_with_a_perfect_prediction_the_wanted_slice_comes_back(
        self, network, slices, embedding, monkeypatch, prediction
    ):
        adapter, wanted = ImageCondition(BackboneShape.of(network), 8, 20, prediction), -0.9 * slices.flip(1)

        def perfect(network, noisy, timesteps, embedding, condition):
            signal, share = (
                table[timesteps].view(-1, 1, 1, 1) for table in (adapter.schedule.signal, adapter.schedule.noise)
            )
            noise = (noisy - signal * wanted) / share
            return noise if prediction is Prediction.EPSILON else signal * noise - share * wanted

        monkeypatch.setattr(adapter, "predict", perfect)
        found = adapter.run(network, slices, embedding, torch.randn_like(slices))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)

    def test_the_loss_asks_for_what_the_backbone_answers(self, network, slices, embedding):
        """A network that answers 0: the loss is the mean square of the target, which for v holds the slice."""
        silent = copy.deepcopy(network)
        for parameter in silent.conv_out.parameters():
            parameter.data.zero_()
        batch = {"condition": slices, "wanted": torch.full_like(slices, 0.7), "embedding": embedding}
        for prediction in Prediction:
            adapter = ImageCondition(BackboneShape.of(network), 8, prediction=prediction)
            with torch.no_grad():
                found = float(generation_loss(adapter, silent, batch, torch.Generator().manual_seed(3)))
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(slices.shape, generator=generator)
            steps = torch.randint(0, 1000, (2,), generator=generator)
            target = noise
            if prediction is Prediction.V:
                kept = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[steps].view(-1, 1, 1, 1)
                target = kept.sqrt() * noise - (1 - kept).sqrt() * batch["wanted"]
            assert found == pytest.approx(float((target**2).mean()), rel=1e-4)

    def test_its_card_tells_what_the_backbone_answers(self, network):
        adapter = ImageCondition(BackboneShape.of(network), 8, prediction=Prediction.V)
        card = adapter.described()
        assert ImageCondition.from_card(card["needs"], card["arguments"]).prediction is Prediction.V

    def test_it_stays_within_the_window(self, network, slices, embedding):
        with torch.no_grad():
            found = a_trained(network).run(network, slices, embedding, torch.randn_like(slices))
        assert found.shape == slices.shape and found.abs().max() <= 1


def pairs(embedding: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
    """Slices that nobody can guess, each with its negative."""
    made = []
    for _ in range(count):
        condition = (torch.rand(8, 1, 16, 16) * 2 - 1).expand(-1, 3, -1, -1)
        made.append({"condition": condition, "wanted": -condition, "embedding": embedding})
    return made


class TestLearning:
    def test_a_frozen_backbone_learns_to_be_guided(self, network, embedding):
        """First a small pretraining without the condition, then the branch alone on what came of it."""
        steps, shape = replace(VIRTUAL_CTA, rate=5e-3, warmup=0, steps=60), BackboneShape.of(network)
        blind = [batch | {"condition": torch.zeros(8, 3, 16, 16)} for batch in pairs(embedding, 60)]
        pretraining = ImageCondition(shape, 8)
        pretraining.tune(network)
        fit(pretraining, network, blind, generation_loss, steps)
        backbone = copy.deepcopy(network)
        backbone.load_state_dict({key.replace("/", "."): tensor for key, tensor in pretraining.tuned.items()})
        before = {key: tensor.clone() for key, tensor in plain_parameters(backbone).items()}
        adapter = ImageCondition(shape, 16)
        fit(adapter, backbone, pairs(embedding, 110), generation_loss, replace(steps, steps=110))
        assert all(torch.equal(tensor, before[key]) for key, tensor in plain_parameters(backbone).items())
        tests = pairs(embedding, 8)

        def loss(of: ImageCondition, batches) -> float:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                return sum(float(generation_loss(of, backbone, batch, generator)) for batch in batches) / len(batches)

        guided, alone = loss(adapter, tests), loss(ImageCondition(shape), tests)
        wrong = loss(adapter, [batch | {"condition": batch["condition"].flip(0)} for batch in tests])
        print(f"guided {guided:.3f}, without the slice {alone:.3f}, by another patient's {wrong:.3f}")
        assert guided < 0.75 * alone and guided < 0.6 * wrong

    def test_a_tuned_backbone_learns_it_too(self, network, embedding):
        """The published recipe: the model is fine-tuned with the condition."""
        before = {key: tensor.clone() for key, tensor in plain_parameters(network).items()}
        adapter = ImageCondition(BackboneShape.of(network), 8)
        adapter.tune(network)
        steps = replace(VIRTUAL_CTA, rate=5e-3, warmup=0, steps=25)
        losses = fit(adapter, network, pairs(embedding, 25), generation_loss, steps)
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
        assert all(torch.equal(tensor, before[key]) for key, tensor in plain_parameters(network).items())
        assert not torch.equal(adapter.tuned["conv_in/weight"], before["conv_in.weight"])
