"""Low-rank adapters: resident beside each other, one at work, the backbone unharmed."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
import torch

from LCTfoundLib.errors import LCTfoundError, WeightError
from LCTfoundLib.networks.adapters import AdapterHost, FeatureRecipe, LinearProbe, LoadedAdapter, load_adapter
from LCTfoundLib.networks.backbone import EMBEDDING_SIZE, backbone_config, build_backbone
from LCTfoundLib.networks.lora import ATTENTION, CONVOLUTIONS, active_lora, add_lora, save_lora, use_lora
from LCTfoundLib.weights.registry import Card, DataSource, save_weight

CARD = Card(
    "task.v1", "1", "a test", "", {}, (1, 1, 1), (), (DataSource("none", "CC0-1.0"),), "Apache-2.0",
    0, "", {}, "tests", "all else",
)  # fmt: skip


@pytest.fixture(autouse=True)
def peft():
    return pytest.importorskip("peft")


def a_backbone(width: int = 16):
    torch.manual_seed(5)
    config = backbone_config(
        "student", block_out_channels=(8, 8, 16, 16, width), norm_num_groups=4, cross_attention_dim=16
    )
    return build_backbone(config).eval()


@pytest.fixture
def network():
    return a_backbone()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 1, EMBEDDING_SIZE)


def answer(network, inputs) -> torch.Tensor:
    with torch.no_grad():
        return network(inputs[0], 10, encoder_hidden_states=inputs[1]).sample


def train_a_little(network) -> None:
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in key
            torch.nn.init.normal_(parameter, std=0.2)


def test_it_starts_as_the_identity_and_is_switched_on_and_off(network, inputs):
    before = answer(network, inputs)
    assert active_lora(network) is None
    add_lora(network, "task.v1", rank=2, targets=CONVOLUTIONS)
    torch.testing.assert_close(answer(network, inputs), before)
    train_a_little(network)
    first = answer(network, inputs)
    assert active_lora(network) == "task.v1" and not torch.allclose(first, before, atol=1e-4)
    add_lora(network, "other", rank=3)
    train_a_little(network)
    second = answer(network, inputs)
    use_lora(network, "task.v1")
    torch.testing.assert_close(answer(network, inputs), first)
    use_lora(network, None)
    assert active_lora(network) is None
    torch.testing.assert_close(answer(network, inputs), before)
    use_lora(network, "other")
    assert active_lora(network) == "other"
    torch.testing.assert_close(answer(network, inputs), second)


def test_a_small_file_brings_it_to_another_copy_of_the_backbone(network, inputs, tmp_path):
    add_lora(network, "task.v1", rank=2, targets=(*ATTENTION, *CONVOLUTIONS))
    train_a_little(network)
    save_lora(network, "task.v1", CARD, tmp_path)
    assert os.path.getsize(tmp_path / "task.v1.safetensors") < 60_000
    other = a_backbone()
    before = answer(other, inputs)
    loaded = load_adapter("task.v1", other, tmp_path)
    assert loaded.adapter is None and loaded.card.architecture == "LoRA"
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert torch.equal(answer(other, inputs), before)  # it waits until it is asked for
    use_lora(other, "task.v1")
    torch.testing.assert_close(answer(other, inputs), answer(network, inputs), rtol=2e-2, atol=2e-2)
    use_lora(other, None)
    torch.testing.assert_close(answer(other, inputs), before)
    with pytest.raises(ValueError, match="exists"):
        load_adapter("task.v1", other, tmp_path)


def test_that_of_another_backbone_is_refused_and_leaves_nothing(network, inputs, tmp_path):
    add_lora(network, "task.v1", rank=2)
    save_lora(network, "task.v1", CARD, tmp_path)
    other = a_backbone(24)
    before = answer(other, inputs)
    with pytest.raises(WeightError, match="another backbone; load the backbone its card names"):
        load_adapter("task.v1", other, tmp_path)
    assert active_lora(other) is None
    assert torch.equal(answer(other, inputs), before)


@pytest.mark.parametrize("arguments", [None, {}, {"rank": 0, "targets": ["to_q"]}, {"rank": 2, "targets": "to_q"}])
def test_a_card_without_rank_and_targets(network, arguments, tmp_path):
    add_lora(network, "task.v1", rank=2)
    card = save_lora(network, "task.v1", CARD, tmp_path)
    parameters = card.architecture_parameters | {"arguments": arguments}
    save_weight({"x": torch.zeros(1)}, replace(card, architecture_parameters=parameters), tmp_path)
    with pytest.raises(WeightError, match="no rank and targets; get the weight"):
        load_adapter("task.v1", a_backbone(), tmp_path)


def test_a_file_that_does_not_fit_leaves_the_one_that_works(network, inputs, tmp_path):
    add_lora(network, "task.v1", rank=2)
    card = save_lora(network, "task.v1", CARD, tmp_path)
    save_weight({"x": torch.zeros(1)}, card, tmp_path)
    other = a_backbone()
    add_lora(other, "works", rank=2)
    train_a_little(other)
    before = answer(other, inputs)
    with pytest.raises(WeightError, match="not what its card describes; get it again"):
        load_adapter("task.v1", other, tmp_path)
    assert active_lora(other) == "works"
    assert torch.equal(answer(other, inputs), before)


def test_heads_work_on_the_adapter_that_is_asked_for(network, inputs):
    recipe = FeatureRecipe.of(network, (1,), (50,))
    host = AdapterHost(network)
    host.add("probe", LoadedAdapter(LinearProbe(recipe, 2).eval()))
    plain = host.run("probe", *inputs)
    add_lora(network, "tuned", rank=2, targets=CONVOLUTIONS)
    train_a_little(network)
    use_lora(network, None)
    host.add("tuned", LoadedAdapter(None, CARD))
    tuned = host.run("probe", *inputs, lora="tuned")
    assert not torch.allclose(tuned, plain, atol=1e-5)
    assert torch.equal(host.run("probe", *inputs), plain)
    assert torch.equal(host.run("probe", *inputs, lora="tuned"), tuned)
    with pytest.raises(WeightError, match="no answer of its own; give the name of another"):
        host.run("tuned", *inputs)
    with pytest.raises(WeightError, match="no low-rank one"):
        host.run("probe", *inputs, lora="probe")
    host.remove("tuned")
    assert host.names == ["probe"]
    assert torch.equal(host.run("probe", *inputs), plain)
    with pytest.raises(KeyError):
        host.run("probe", *inputs, lora="tuned")


def test_peft_is_not_installed(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LCTfoundError, match="package peft; install it"):
        add_lora(network, "x")
