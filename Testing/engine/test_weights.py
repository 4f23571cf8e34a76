"""Weights: saved in half precision with a card, found in order, refused when damaged or not to be trusted."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LCTfoundLib.errors import OutputError, WeightError
from LCTfoundLib.weights import registry
from LCTfoundLib.weights.registry import (
    Card,
    DataSource,
    list_weights,
    load_card,
    load_weight,
    save_weight,
    search_folders,
    verify,
    verify_in_steps,
)

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def only_the_tests_own_folders(monkeypatch, tmp_path):
    """Neither the user's nor the shipped weights are seen."""
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "site" / "LCTfoundLib" / "weights" / "registry.py"))
    monkeypatch.setattr(registry, "user_folder", lambda: tmp_path / "user")
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


def a_card(**changes) -> Card:
    card = Card(
        name="toy",
        version="1.0",
        task="a test",
        architecture="UNet3D",
        architecture_parameters={"heads": [2, 3]},
        spacing=(2.5, 2.5, 2.5),
        classes=("background", "Gefäß"),
        data=(DataSource("synthetic thorax", "Apache-2.0"),),
        license="Apache-2.0",
        seed=1,
        commit="abc",
        numbers={"synthetic": {"dice": 0.9}},
        intended_use="tests",
        limits="all else",
    )
    return replace(card, **changes)


def a_state() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 4)
    return {
        "a.weight": torch.randn(8, 3, 3, 3, 3) / 10,
        "a.bias": shared[:, 1],
        "b": shared,
        "norm.num_batches_tracked": torch.tensor(123456789),
    }


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


class TestSavingAndLoading:
    def test_what_was_saved_comes_back(self, tmp_path):
        state = a_state()
        written = save_weight(state, a_card(), tmp_path / "w")
        card, loaded = load_weight("toy", tmp_path / "w")
        assert card == written
        assert card.bytes == (tmp_path / "w" / "toy.safetensors").stat().st_size
        assert loaded.keys() == state.keys()
        for key, tensor in state.items():
            assert loaded[key].dtype == tensor.dtype
            torch.testing.assert_close(loaded[key], tensor, atol=1e-4, rtol=1e-3)
        assert torch.equal(loaded["a.weight"], state["a.weight"].half().float())

    def test_it_takes_two_bytes_a_value(self, tmp_path):
        card = save_weight({"x": torch.zeros(100_000)}, a_card(), tmp_path)
        assert card.bytes < 201_000

    def test_a_replaced_weight_is_the_new_one(self, tmp_path):
        save_weight({"x": torch.zeros(3)}, a_card(), tmp_path)
        save_weight({"x": torch.ones(5)}, a_card(version="2"), tmp_path)
        card, state = load_weight("toy", tmp_path)
        assert card.version == "2"
        assert torch.equal(state["x"], torch.ones(5))
        assert sorted(os.listdir(tmp_path)) == ["toy.json", "toy.safetensors"]

    @pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
    def test_values_that_half_precision_cannot_hold_are_refused(self, value, tmp_path):
        with pytest.raises(ValueError, match="float16"):
            save_weight({"x": torch.tensor([value])}, a_card(), tmp_path)
        assert not os.listdir(tmp_path)

    @pytest.mark.parametrize("name", ["../toy", "a/b", "", ".hidden", "x" * 200])
    def test_names_that_leave_the_folder_are_refused(self, name, tmp_path):
        with pytest.raises(ValueError):
            save_weight({"x": torch.zeros(1)}, a_card(name=name), tmp_path)
        with pytest.raises(WeightError, match="no name"):
            load_weight(name, tmp_path)

    def test_a_card_that_could_not_be_read_back_is_not_written(self, tmp_path):
        with pytest.raises(ValueError):
            save_weight({"x": torch.zeros(1)}, a_card(spacing=(0, 1, 1)), tmp_path)
        assert not os.listdir(tmp_path)

    def test_a_place_that_is_a_file_is_told(self, tmp_path):
        (tmp_path / "w").write_text("")
        with pytest.raises(OutputError):
            save_weight({"x": torch.zeros(1)}, a_card(), tmp_path / "w")


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        save_weight(a_state(), a_card(), tmp_path / "w")
        return tmp_path / "w"

    def check(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message) as caught:
            load_weight("toy", folder)
        assert str(caught.value).endswith(".")

    def test_one_changed_byte(self, folder):
        content = bytearray((folder / "toy.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "toy.safetensors").write_bytes(content)
        self.check(folder, "checksum.*get it again")
        (entry,) = list_weights([folder])
        assert not entry.problem and "checksum" in verify(entry)

    def test_a_cut_file(self, folder):
        content = (folder / "toy.safetensors").read_bytes()
        (folder / "toy.safetensors").write_bytes(content[:-100])
        self.check(folder, "bytes instead of")

    def test_a_wrong_checksum_in_the_card(self, folder):
        rewrite(folder / "toy.json", sha256="0" * 64)
        self.check(folder, "checksum")

    def test_a_card_of_another_weight(self, folder):
        rewrite(folder / "toy.json", name="other")
        self.check(folder, "'other'")

    def test_a_missing_card(self, folder):
        (folder / "toy.json").unlink()
        self.check(folder, "missing; put it beside")
        (entry,) = list_weights([folder])
        assert entry.card is None and "missing" in entry.problem and verify(entry) == entry.problem

    def test_a_pickled_file_is_not_opened(self, folder):
        (folder / "toy.safetensors").unlink()
        (folder / "toy.pth").write_bytes(pickle.dumps({"x": 1}))
        self.check(folder, "may run code")

    def test_a_pickled_file_under_a_false_name(self, folder):
        content = pickle.dumps({"x": list(range(1000))})
        (folder / "toy.safetensors").write_bytes(content)
        import hashlib

        rewrite(folder / "toy.json", sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        self.check(folder, "no safetensors")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("[1]", "not a JSON object"),
            ("{}", "without name"),
            ("[" * 100_000, "cannot be read"),
            ('"' + "x" * 1_100_000 + '"', "larger than a card"),
            (b"\xff\xfe{}", "cannot be read"),
        ],
    )
    def test_a_damaged_card(self, text, message, folder):
        (folder / "toy.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.check(folder, message)

    @pytest.mark.parametrize(
        "changes",
        [
            {"spacing": [1, 2]},
            {"spacing": [1, 2, "3"]},
            {"spacing": [1, 2, float("nan")]},
            {"classes": "lung"},
            {"classes": [1]},
            {"data": ["LIDC"]},
            {"data": [{"name": "LIDC"}]},
            {"seed": "1"},
            {"bytes": True},
            {"sha256": "abc"},
            {"numbers": []},
            {"name": "../x"},
            {"architecture": None},
        ],
    )
    def test_a_card_with_a_wrong_field(self, changes, folder):
        rewrite(folder / "toy.json", **changes)
        self.check(folder, f"'{next(iter(changes))}' must be")

    def test_fields_of_later_versions_do_no_harm(self, folder):
        rewrite(folder / "toy.json", new_field=1)
        assert load_card(folder / "toy.json").name == "toy"


class TestSearch:
    def test_order_explicit_environment_user_package_clone(self, tmp_path, monkeypatch):
        places = {
            "explicit": tmp_path / "explicit",
            "environment": tmp_path / "environment",
            "user": tmp_path / "user",
            "package": tmp_path / "site" / "LCTfoundLib" / "Resources" / "Weights",
            "clone": tmp_path / "site" / "Resources" / "Weights",
        }
        for version, folder in places.items():
            save_weight({"x": torch.zeros(1)}, a_card(version=version), folder)
        monkeypatch.setenv(
            registry.ENVIRONMENT_VARIABLE, os.pathsep.join([str(tmp_path / "none"), str(places["environment"])])
        )
        assert search_folders(places["explicit"]) == list(places.values())
        assert load_weight("toy", places["explicit"])[0].version == "explicit"
        for version in ("environment", "user", "package", "clone"):
            assert load_weight("toy")[0].version == version
            (entry,) = list_weights()
            assert entry.card is not None and entry.card.version == version
            (places[version] / "toy.safetensors").unlink()
        with pytest.raises(WeightError, match="There is no weight 'toy'.*put toy.safetensors"):
            load_weight("toy")

    def test_a_weight_missing_in_the_explicit_folder_is_looked_for_elsewhere(self, tmp_path):
        (tmp_path / "explicit").mkdir()
        save_weight({"x": torch.zeros(1)}, a_card(), tmp_path / "user")
        assert load_weight("toy", tmp_path / "explicit")[0].name == "toy"

    def test_an_explicit_folder_that_is_not_there_is_told(self, tmp_path):
        with pytest.raises(WeightError, match="no folder"):
            load_weight("toy", tmp_path / "typo")

    def test_weights_are_listed_by_name(self, tmp_path):
        for name in ("b", "a"):
            save_weight({"x": torch.zeros(1)}, a_card(name=name), tmp_path)
        assert [entry.name for entry in list_weights([tmp_path])] == ["a", "b"]
        assert [verify(entry) for entry in list_weights([tmp_path])] == ["", ""]


def test_the_users_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert registry.user_folder() == tmp_path / "LCTfound" / "Weights"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert registry.user_folder() == tmp_path / "Local" / "LCTfound" / "Weights"
    monkeypatch.setattr("sys.platform", "darwin")
    assert "Application Support" in str(registry.user_folder())


class TestWithoutTorch:
    def test_weights_are_listed_and_checked_where_torch_cannot_be_imported(self, tmp_path):
        save_weight(a_state(), a_card(), tmp_path)
        code = (
            "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
            "from LCTfoundLib.weights.registry import list_weights, verify\n"
            f"print([(e.name, verify(e)) for e in list_weights([{str(tmp_path)!r}])])"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        assert answer.stdout.strip() == "[('toy', '')]", answer.stderr

    def test_a_check_in_steps_tells_its_progress(self, tmp_path, monkeypatch):
        monkeypatch.setattr(registry, "_STEP_BYTES", 1000)
        save_weight({"x": torch.zeros(2000)}, a_card(), tmp_path)
        (entry,) = list_weights([tmp_path])
        fractions = list(verify_in_steps(entry))
        assert len(fractions) == 5 and fractions == sorted(fractions) and fractions[-1] == 1.0
