"""Cold diffusion: the degradation and its way back against their formulas, and the adapter that restores with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from LCTfoundLib.networks.adapter_base import BackboneShape, plain_parameters, with_tensors
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE
from LCTfoundLib.networks.cold_diffusion import ColdDiffusion, ColdRestorer, EndState
from LCTfoundLib.networks.tuned import OutputLayer
from Testing.engine.toy_backbones import two_levels
from training.adapters.fit import LOW_DOSE, fit, restoration_loss

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded(rng) -> None:
    torch.manual_seed(int(rng.integers(2**31)))


@pytest.fixture
def steps(rng) -> int:
    return int(rng.integers(2, 15))


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.rand(2, 1, 8, 12) * 2 - 1


@pytest.fixture
def low(clean) -> torch.Tensor:
    return clean + 0.3 * torch.randn_like(clean)


class TestDegradation:
    def test_its_ends_are_the_slices_themselves(self, steps, clean, low):
        process = ColdDiffusion(steps)
        assert torch.equal(process.degrade(clean, low, 0), clean)
        assert torch.equal(process.degrade(clean, low, steps), low)
        ends = process.degrade(clean, low, torch.tensor([0, steps]))
        assert torch.equal(ends[0], clean[0]) and torch.equal(ends[1], low[1])

    def test_it_keeps_the_mean_that_the_slices_share(self, steps, clean):
        noise = torch.randn_like(clean)
        low = clean + noise - noise.mean()
        for step in range(steps + 1):
            torch.testing.assert_close(ColdDiffusion(steps).degrade(clean, low, step).mean(), clean.mean())

    def test_the_noise_grows_in_equal_steps(self, steps, clean, low):
        process = ColdDiffusion(steps)
        norms = [float((process.degrade(clean, low, step) - clean).norm()) for step in range(steps + 1)]
        assert np.diff(norms) == pytest.approx(norms[-1] / steps, rel=1e-3)

    @pytest.mark.parametrize("steps", [0, -3])
    def test_it_has_steps(self, steps):
        with pytest.raises(ValueError):
            ColdDiffusion(steps)


class TestWayBack:
    @pytest.mark.parametrize("end", EndState)
    def test_a_perfect_restorer_brings_the_clean_slice(self, steps, clean, low, end):
        told = []

        def restorer(state, step, previous):
            told.append(step)
            torch.testing.assert_close(state, ColdDiffusion(steps).degrade(clean, low, step), rtol=0, atol=1e-5)
            assert torch.equal(previous, low if step == steps else clean)
            return clean

        found = ColdDiffusion(steps).restore(restorer, low, end)
        assert told == list(range(steps, 0, -1))
        if end is EndState.IMPLIED:
            assert torch.equal(found, clean)
        else:
            torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("end", EndState)
    def test_the_loop_equals_the_published_formula_in_double_precision(self, steps, low, end):
        """x_{t-1} = x_t - D(x_0', x_T', t) + D(x_0', x_T', t - 1), with a restorer that is wrong at every step."""
        errors = torch.randn(steps + 1, *low.shape)

        def restorer(state, step, previous):
            return 0.7 * state + 0.2 * previous + 0.1 * errors[step]

        found = ColdDiffusion(steps).restore(restorer, low, end)
        x_end = low.double().numpy()
        x, last, noise = x_end, x_end, errors.double().numpy()
        for t in range(steps, 0, -1):
            last = 0.7 * x + 0.2 * last + 0.1 * noise[t]
            a, below = 1 - t / steps, 1 - (t - 1) / steps
            end_now = x_end if end is EndState.MEASURED else (x - a * last) / (1 - a)
            x = x - (a * last + (1 - a) * end_now) + (below * last + (1 - below) * end_now)
        np.testing.assert_allclose(found.numpy(), x, rtol=0, atol=1e-5)

    def test_with_the_measured_end_the_answer_is_the_mean_of_the_estimates(self, steps, low):
        estimates = torch.randn(steps + 1, *low.shape)
        found = ColdDiffusion(steps).restore(lambda _, step, __: estimates[step], low, EndState.MEASURED)
        torch.testing.assert_close(found, estimates[1:].mean(dim=0), rtol=0, atol=1e-5)

    def test_with_the_implied_end_the_answer_is_the_last_estimate(self, steps, low):
        estimates = torch.randn(steps + 1, *low.shape)
        found = ColdDiffusion(steps).restore(lambda _, step, __: estimates[step], low)
        assert torch.equal(found, estimates[1])


@pytest.fixture(scope="module")
def network():
    return two_levels()


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(1, 1, EMBEDDING_SIZE)


def a_restorer(network, **options: object) -> ColdRestorer:
    """With values as after a training."""
    restorer = ColdRestorer(BackboneShape.of(network), 8, **options)
    for parameter in restorer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return restorer.eval()


def patients(embedding: torch.Tensor, count: int = 4) -> dict[str, torch.Tensor]:
    """Smooth random slices, and three noisy ones of each, as neighbors of a thin scan are nearly the same slice."""
    clean = F.interpolate(torch.randn(count, 1, 4, 4), (24, 24), mode="bicubic", align_corners=True).clamp(-1, 1)
    low = clean.expand(-1, 3, -1, -1) + 0.3 * torch.randn(count, 3, 24, 24)
    return {"low": low, "clean": clean, "embedding": embedding}


class TestRestorer:
    def test_untrained_it_gives_the_slice_back(self, network, embedding):
        low = patients(embedding)["low"]
        with torch.no_grad():
            found = ColdRestorer(BackboneShape.of(network)).run(network, low, embedding, low)
        assert torch.equal(found, low[:, 1:2])

    @pytest.mark.parametrize("end", EndState)
    def test_it_goes_the_way_back_with_the_state_between_its_neighbors(self, network, embedding, end):
        restorer, low = a_restorer(network, timesteps=(3, 40, 9), end=end), patients(embedding)["low"]
        seen = []

        def spy(module, inputs, named):
            seen.append((inputs[0], inputs[1]))

        handle = network.register_forward_pre_hook(spy, with_kwargs=True)
        with torch.no_grad():
            found = restorer.run(network, low, embedding, low)
        handle.remove()
        assert found.shape == (4, 1, 24, 24)
        assert [int(timesteps[0]) for _, timesteps in seen] == [9, 40, 3]
        assert torch.equal(seen[0][0], low)
        for images, _ in seen:
            assert torch.equal(images[:, 0], low[:, 0]) and torch.equal(images[:, 2], low[:, 2])
        assert not torch.equal(seen[1][0][:, 1], low[:, 1])

    def test_the_last_estimate_the_neighbors_and_the_step_all_count(self, network, embedding):
        restorer, low = a_restorer(network, timesteps=(0, 300)), patients(embedding)["low"]
        state = low[:, 1:2]
        expanded = embedding.expand(4, -1, -1)

        def estimate(step=1, previous=state, around=low):
            with torch.no_grad():
                return run_estimate(restorer, network, state, step, previous, around, expanded)

        plain = estimate()
        assert not torch.allclose(estimate(step=2), plain, atol=1e-5)
        assert not torch.allclose(estimate(previous=-state), plain, atol=1e-5)
        for side in (0, 2):
            other = low.clone()
            other[:, side] += 1
            assert not torch.allclose(estimate(around=other), plain, atol=1e-5)
        both = estimate(step=torch.tensor([1, 1, 2, 2]))
        torch.testing.assert_close(both[:2], plain[:2])
        torch.testing.assert_close(both[2:], estimate(step=2)[2:])

    @pytest.mark.parametrize("timesteps", [(), (1000,), (-1, 3)])
    def test_timesteps_that_the_backbone_does_not_have(self, network, timesteps):
        with pytest.raises(ValueError, match="timesteps"):
            ColdRestorer(BackboneShape.of(network), timesteps=timesteps)

    def test_training_restores_and_leaves_the_frozen_backbone_bit_for_bit(self, network, embedding):
        before = {key: tensor.clone() for key, tensor in plain_parameters(network).items()}
        restorer = ColdRestorer(BackboneShape.of(network), 16, (0, 10, 20, 30))
        settings = replace(LOW_DOSE, rate=2e-3, steps=60)
        losses = fit(restorer, network, [patients(embedding) for _ in range(60)], restoration_loss, settings)
        assert all(torch.equal(tensor, before[key]) for key, tensor in plain_parameters(network).items())
        test = patients(embedding, 8)
        with torch.no_grad():
            found = restorer.run(network, test["low"], embedding, test["low"])
        noisy, error = (float(F.mse_loss(x, test["clean"])) for x in (test["low"][:, 1:2], found))
        averaged = float(F.mse_loss(test["low"].mean(dim=1, keepdim=True), test["clean"]))
        print(
            f"loss {losses[0]:.4f} to {losses[-1]:.4f}; error {noisy:.4f} to {error:.4f}, mean of three {averaged:.4f}"
        )
        assert error < averaged < noisy  # more than what the neighbors alone explain

    def test_every_value_of_the_sub_network_learns(self, network, embedding):
        restorer = a_restorer(network).train()
        batch = patients(embedding)
        restoration_loss(restorer, network, batch, torch.Generator().manual_seed(0)).backward()
        for name, parameter in restorer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_the_loss_is_that_of_two_estimates_one_step_apart(self, network, embedding):
        restorer, batch = a_restorer(network, timesteps=(0, 10, 20)), patients(embedding, 2)
        clean, low = batch["clean"], batch["low"]
        with torch.no_grad():
            found = restoration_loss(restorer, network, batch, torch.Generator().manual_seed(9))
            steps = torch.randint(1, 4, (2,), generator=torch.Generator().manual_seed(9))
            squares = []
            for n, step in enumerate(steps.tolist()):
                one, middle = low[n : n + 1], low[n : n + 1, 1:2]
                state = (1 - step / 3) * clean[n : n + 1] + step / 3 * middle
                first = run_estimate(restorer, network, state, step, state, one, embedding)
                below = max(step - 1, 1)
                state = (1 - below / 3) * first + below / 3 * middle
                second = run_estimate(restorer, network, state, below, first, one, embedding)
                squares += [(estimate - clean[n : n + 1]).square().mean() for estimate in (first, second)]
        torch.testing.assert_close(found, torch.stack(squares).mean(), rtol=1e-4, atol=1e-5)

    def test_another_adapter_is_no_restorer(self, network, embedding):
        layer = OutputLayer(BackboneShape.of(network), 2)
        with pytest.raises(TypeError, match="OutputLayer restores nothing"):
            restoration_loss(layer, network, patients(embedding), torch.Generator())


def run_estimate(restorer, network, *arguments: object) -> torch.Tensor:
    """On the backbone with the restorer's output layer."""
    return with_tensors(network, restorer.tensors(), lambda n: restorer.estimate(n, *arguments))
