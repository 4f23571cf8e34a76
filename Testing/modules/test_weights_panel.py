"""Weights in Slicer: listed, checked, brought in, deleted; licenses acknowledged once; their section of the panel."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from LCTfoundLib.errors import WeightError
from LCTfoundLib.weights import registry
from LCTfoundSlicer import weights as weights_code
from LCTfoundSlicer.weights import (
    CheckResult,
    Origin,
    WeightImport,
    Weights,
    cardLines,
    isPermissive,
    licenseText,
    needsAcknowledgement,
)

_LCTFOUND = Path(__file__).resolve().parents[2] / "LCTfound"


class MemorySettings(dict):
    """As QSettings answers."""

    def value(self, key):
        return self.get(key)

    def setValue(self, key, value):
        self[key] = value

    def remove(self, key):
        self.pop(key, None)


def put_weight(folder: Path, name: str, content: bytes | None = None, **changes) -> Path:
    """A weight with a right card; nothing here reads tensors, so any bytes will do."""
    content = os.urandom(100_000) if content is None else content
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    path.write_bytes(content)
    card = {
        "name": name,
        "version": "1",
        "task": "a test",
        "architecture": "UNet3D",
        "architecture_parameters": {},
        "spacing": [1.5, 1.5, 1.5],
        "classes": ["background", "lung"],
        "data": [{"name": "phantom", "license": "Apache-2.0"}],
        "license": "Apache-2.0",
        "seed": 1,
        "commit": "abc",
        "numbers": {"held out": {"dice": 0.91, "lobes_dice": {"left": 0.9}}},
        "intended_use": "tests & <nothing> else",
        "limits": "all",
        "training": {},
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        **changes,
    }
    (folder / f"{name}.json").write_text(json.dumps(card))
    return path


def finish(steps):
    """Run a generator to its end: (what it yielded, what it returned)."""
    yielded = []
    while True:
        try:
            yielded.append(next(steps))
        except StopIteration as end:
            return yielded, end.value


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """Places of this test only."""
    places = {name: tmp_path / name for name in ("shipped", "user", "chosen", "environment", "usb")}
    for module in (registry, weights_code):
        monkeypatch.setattr(module, "user_folder", lambda: places["user"])
        monkeypatch.setattr(module, "shipped_folders", lambda: [places["shipped"]])
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, str(places["environment"]))
    put_weight(places["shipped"], "lung")
    places["chosen"].mkdir()
    return places


@pytest.fixture
def weights(folders) -> Weights:
    return Weights(MemorySettings())


class TestFolder:
    def test_the_chosen_folder_comes_first_and_survives_a_restart(self, folders, weights):
        put_weight(folders["chosen"], "lung", version="7")
        assert weights.find("lung").card.version == "1" and weights.usableFolder() is None
        weights.chooseFolder(folders["chosen"])
        again = Weights(weights._settings)
        assert again.find("lung").card.version == "7" and again.find("lung").origin is Origin.CHOSEN
        assert again.usableFolder() == str(folders["chosen"])
        again.chooseFolder(None)
        assert Weights(weights._settings).folder is None

    def test_a_folder_that_is_not_there_is_refused(self, folders, weights):
        with pytest.raises(WeightError, match="no folder"):
            weights.chooseFolder(folders["usb"])

    def test_a_chosen_folder_that_went_away_is_remembered_but_not_sent(self, folders, weights):
        weights.chooseFolder(folders["chosen"])
        folders["chosen"].rmdir()
        assert weights.folder == folders["chosen"] and weights.usableFolder() is None
        assert weights.find("lung").origin is Origin.SHIPPED

    @pytest.mark.parametrize("value", [None, "", 5, ["a"]])
    def test_damaged_settings_do_no_harm(self, folders, value):
        settings = MemorySettings({"LCTfound/WeightsFolder": value, "LCTfound/AcknowledgedLicenses": value})
        assert Weights(settings).folder is None and Weights(settings).unacknowledged(["lung"]) == []


class TestCheck:
    def test_a_good_weight_becomes_good_and_is_forgotten_when_it_changes(self, folders, weights):
        assert weights.find("lung").result is CheckResult.UNCHECKED
        fractions, problem = finish(weights.check(weights.find("lung")))
        assert problem == "" and fractions[-1] == 1.0
        assert weights.find("lung").result is CheckResult.GOOD
        os.utime(folders["shipped"] / "lung.safetensors", (1, 1))
        assert weights.find("lung").result is CheckResult.UNCHECKED

    def test_a_changed_byte_is_found(self, folders, weights):
        path = folders["shipped"] / "lung.safetensors"
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
        _, problem = finish(weights.check(weights.find("lung")))
        found = weights.find("lung")
        assert "checksum" in problem and found.result is CheckResult.BAD and found.problem == problem

    def test_a_weight_without_a_card_is_shown_as_damaged(self, folders, weights):
        (folders["shipped"] / "lung.json").unlink()
        found = weights.find("lung")
        assert found.result is CheckResult.BAD and "missing" in found.problem
        assert ("Problem", found.problem) in cardLines(found)

    def test_it_comes_in_steps(self, weights, monkeypatch):
        monkeypatch.setattr(registry, "_STEP_BYTES", 10_000)
        fractions, _ = finish(weights.check(weights.find("lung")))
        assert len(fractions) == 10 and fractions == sorted(fractions)


class TestImport:
    def test_weights_come_with_their_cards_into_the_users_folder(self, folders, weights):
        put_weight(folders["usb"], "a")
        put_weight(folders["usb"], "b")
        fractions, result = finish(weights.importFrom(folders["usb"]))
        assert result == WeightImport(("a", "b")) and fractions[-1] == 1.0
        assert sorted(os.listdir(folders["user"])) == ["a.json", "a.safetensors", "b.json", "b.safetensors"]
        assert weights.find("a").origin is Origin.USER
        assert finish(weights.check(weights.find("b")))[1] == ""

    def test_they_go_into_the_chosen_folder_where_there_is_one(self, folders, weights):
        weights.chooseFolder(folders["chosen"])
        put_weight(folders["usb"], "a")
        finish(weights.importFrom(folders["usb"]))
        assert weights.find("a").entry.path.parent == folders["chosen"] and not folders["user"].exists()

    def test_nothing_goes_where_the_shipped_ones_lie(self, folders, weights):
        weights.chooseFolder(folders["shipped"])
        assert weights.importFolder() == folders["user"]

    def test_a_damaged_one_is_refused_and_the_others_come(self, folders, weights):
        put_weight(folders["usb"], "bad", sha256="0" * 64)
        put_weight(folders["usb"], "good")
        (folders["usb"] / "alone.safetensors").write_bytes(b"x")
        _, result = finish(weights.importFrom(folders["usb"]))
        assert result.imported == ("good",) and len(result.problems) == 2
        assert any("checksum" in problem for problem in result.problems)
        assert any("alone.json is missing" in problem for problem in result.problems)
        assert sorted(os.listdir(folders["user"])) == ["good.json", "good.safetensors"]

    def test_a_damaged_one_does_not_replace_a_good_one(self, folders, weights):
        good = put_weight(folders["user"], "a").read_bytes()
        put_weight(folders["usb"], "a", bytes=5)
        _, result = finish(weights.importFrom(folders["usb"]))
        assert not result.imported and (folders["user"] / "a.safetensors").read_bytes() == good

    def test_a_new_version_replaces_the_old(self, folders, weights):
        put_weight(folders["user"], "a")
        put_weight(folders["usb"], "a", version="2")
        finish(weights.importFrom(folders["usb"]))
        assert weights.find("a").card.version == "2"
        assert finish(weights.check(weights.find("a")))[1] == ""

    def test_a_card_of_another_weight_is_refused(self, folders, weights):
        put_weight(folders["usb"], "b")
        for ending in (".safetensors", ".json"):
            (folders["usb"] / f"b{ending}").rename(folders["usb"] / f"a{ending}")
        _, result = finish(weights.importFrom(folders["usb"]))
        assert "that of 'b'" in result.problems[0]

    def test_an_import_that_is_stopped_leaves_nothing(self, folders, weights, monkeypatch):
        monkeypatch.setattr(weights_code, "_STEP_BYTES", 1000)
        put_weight(folders["usb"], "a")
        steps = weights.importFrom(folders["usb"])
        next(steps)
        steps.close()
        assert os.listdir(folders["user"]) == []

    def test_a_folder_without_weights_is_told(self, folders, weights):
        folders["usb"].mkdir()
        assert "no weight" in finish(weights.importFrom(folders["usb"]))[1].problems[0]

    def test_the_folder_of_weights_itself_is_no_source(self, folders, weights):
        content = put_weight(folders["user"], "a").read_bytes()
        _, result = finish(weights.importFrom(folders["user"]))
        assert "already" in result.problems[0] and (folders["user"] / "a.safetensors").read_bytes() == content

    def test_a_place_that_cannot_be_written_is_told(self, folders, weights):
        weights.chooseFolder(folders["chosen"])
        folders["chosen"].rmdir()
        folders["chosen"].write_text("a file is in the way")
        put_weight(folders["usb"], "a")
        assert "cannot be written" in finish(weights.importFrom(folders["usb"]))[1].problems[0]


class TestDelete:
    @pytest.mark.parametrize(("place", "allowed"), [("user", True), ("chosen", True), ("environment", False)])
    def test_only_what_the_user_brought_in(self, folders, weights, place, allowed):
        weights.chooseFolder(folders["chosen"])
        path = put_weight(folders[place], "mine")
        found = weights.find("mine")
        assert found.canBeDeleted is allowed
        if allowed:
            weights.delete(found)
            assert weights.find("mine") is None and not path.with_suffix(".json").exists()
        else:
            with pytest.raises(WeightError, match="stays"):
                weights.delete(found)
            assert path.is_file()

    def test_shipped_ones_stay_even_when_their_folder_was_chosen(self, folders, weights, tmp_path):
        (tmp_path / "link").symlink_to(folders["shipped"])
        for place in (folders["shipped"], tmp_path / "link"):
            weights.chooseFolder(place)
            found = weights.find("lung")
            assert not found.canBeDeleted
            with pytest.raises(WeightError):
                weights.delete(found)
        assert (folders["shipped"] / "lung.safetensors").is_file()

    def test_below_a_deleted_one_the_shipped_one_appears(self, folders, weights):
        put_weight(folders["user"], "lung", version="9")
        weights.delete(weights.find("lung"))
        assert weights.find("lung").card.version == "1"


class TestLicense:
    @pytest.mark.parametrize(
        "license",
        ["Apache-2.0", "MIT", "BSD-3-Clause", "BSD", "CC0-1.0", "CC-BY-4.0", "CC BY 3.0", "mit", "Apache-2.0 AND MIT"]
        + ["GPL-3.0-only OR MIT", "(MIT AND CC0-1.0) OR LGPL-2.1", "CC-BY-4.0, CC-BY-3.0"],
    )
    def test_permissive(self, license):
        assert isPermissive(license)

    @pytest.mark.parametrize(
        "license",
        ["CC-BY-NC-4.0", "CC-BY-SA-4.0", "CC-BY-NC-ND-4.0", "GPL-3.0-only", "", "  ", "unknown", "MIT AND CC-BY-NC-4.0"]
        + ["research only", "MIT-like", "Apache-2.0 AND", "proprietary MIT"],
    )
    def test_restricted(self, license):
        assert not isPermissive(license)

    def test_a_restricted_license_is_acknowledged_once_per_weight_version_and_license(self, folders, weights):
        put_weight(folders["user"], "nc", license="CC-BY-NC-4.0")
        put_weight(folders["user"], "other", license="CC-BY-NC-4.0")
        (card,) = weights.unacknowledged(["lung", "nc"])
        assert card.name == "nc" and "CC-BY-NC-4.0" in licenseText(card)
        weights.acknowledge(card)
        again = Weights(weights._settings)
        assert again.unacknowledged(["lung", "nc"]) == []
        assert [card.name for card in again.unacknowledged(["other"])] == ["other"]
        put_weight(folders["user"], "nc", license="CC-BY-NC-4.0", version="2")
        assert len(again.unacknowledged(["nc"])) == 1
        put_weight(folders["user"], "nc", license="CC-BY-NC-ND-4.0")
        assert len(again.unacknowledged(["nc"])) == 1

    def test_restricted_data_count_as_much_as_the_weights_own_license(self, folders, weights):
        put_weight(folders["user"], "mixed", data=[{"name": "set", "license": "CC-BY-NC-3.0"}])
        card = weights.find("mixed").card
        assert needsAcknowledgement(card) and "CC-BY-NC-3.0" in licenseText(card)

    def test_the_weights_that_ship_need_none(self):
        assert Weights(MemorySettings()).unacknowledged(["lung_coarse", "lung_fine"]) == []


def test_a_card_is_shown_whole(folders, weights):
    lines = dict(cardLines(weights.find("lung")))
    assert lines["License"] == "Apache-2.0" and lines["Trained on"] == "phantom (Apache-2.0)"
    assert lines["Measured"] == "held out: dice 0.91, lobes dice (left 0.9)"
    assert lines["Limits"] == "all" and "not checked yet" in lines["SHA-256"]


# -- on the host ---------------------------------------------------------------------------------------------------


@pytest.fixture
def panel(host, folders):
    """The home panel on the places of this test."""
    import slicer

    slicer.app.userSettings().remove("LCTfound")
    host.load_module(_LCTFOUND / "LCTfound" / "LCTfound.py")
    widget = slicer.modules.lctfound.createNewWidgetRepresentation()
    yield widget.self()
    widget.self().cleanup()
    widget.deleteLater()


def rows(panel) -> list[list[str]]:
    table = panel.ui.weightsTable
    return [[table.item(r, c).text() for c in range(table.columnCount)] for r in range(table.rowCount)]


class TestSection:
    def test_weights_are_listed_with_card_and_license(self, panel):
        ((name, version, size, license, state),) = rows(panel)
        assert (name, version, size, license) == ("lung", "1", "0.1 MB", "Apache-2.0")
        assert state == "not checked yet" and "came with LCTfound" in panel.ui.weightDetails.plainText
        assert "phantom (Apache-2.0)" in panel.ui.weightDetails.plainText
        assert "tests & <nothing> else" in panel.ui.weightDetails.plainText
        assert not panel.ui.deleteWeightButton.enabled

    def test_a_check_runs_while_the_window_goes_on(self, host, panel, folders):
        panel.ui.checkWeightsButton.click()
        assert panel.weightsSection.isBusy and not panel.ui.importWeightsButton.enabled
        host.wait_for(lambda: not panel.weightsSection.isBusy)
        assert "checksum right" in rows(panel)[0][-1]
        assert "match their checksums" in panel.ui.weightsStatusLabel.text
        path = folders["shipped"] / "lung.safetensors"
        path.write_bytes(b"x" * path.stat().st_size)
        panel.ui.checkWeightsButton.click()
        host.wait_for(lambda: not panel.weightsSection.isBusy)
        assert "damaged" in rows(panel)[0][-1] and "get it again" in panel.ui.weightsStatusLabel.text

    def test_the_folder_typed_is_used_once_it_is_one(self, panel, folders):
        put_weight(folders["chosen"], "extra")
        panel.ui.weightsPathLineEdit.currentPath = str(folders["chosen"])[:-2]
        assert len(rows(panel)) == 1 and "no such folder" in panel.ui.weightsStatusLabel.text
        panel.ui.weightsPathLineEdit.currentPath = str(folders["chosen"])
        assert [row[0] for row in rows(panel)] == ["extra", "lung"]
        from LCTfoundSlicer.weights import weightsFolder

        assert weightsFolder() == str(folders["chosen"])
        panel.ui.weightsPathLineEdit.currentPath = ""
        assert len(rows(panel)) == 1 and weightsFolder() is None

    def test_import_and_delete(self, host, panel, folders, monkeypatch):
        import slicer

        answers = [False, True]
        monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", lambda text, *rest: answers.pop(0))
        put_weight(folders["usb"], "mine")
        panel.weightsSection.importFrom(folders["usb"])
        host.wait_for(lambda: not panel.weightsSection.isBusy)
        assert "Brought in: mine" in panel.ui.weightsStatusLabel.text
        names = [row[0] for row in rows(panel)]
        panel.ui.weightsTable.selectRow(names.index("mine"))
        assert panel.ui.deleteWeightButton.enabled and panel.weightsSection.selected.name == "mine"
        panel.ui.deleteWeightButton.click()
        assert "mine" in [row[0] for row in rows(panel)], "the answer was no"
        panel.ui.deleteWeightButton.click()
        assert [row[0] for row in rows(panel)] == ["lung"] and not list(folders["user"].iterdir())

    def test_a_restricted_license_is_asked_for_before_the_first_use(self, host, panel, folders, monkeypatch):
        import slicer

        from LCTfoundSlicer.setup_widget import ensureReady

        put_weight(folders["user"], "nc", license="CC-BY-NC-4.0")
        with pytest.raises(WeightError, match="not acknowledged"):
            ensureReady(["nc"])
        asked = []
        monkeypatch.setattr(host, "testing", False)
        monkeypatch.setattr(slicer.util, "mainWindow", lambda *_: object())

        def answer(text, *rest, **more):
            asked.append(text)
            return len(asked) > 1

        monkeypatch.setattr(slicer.util, "confirmYesNoDisplay", answer)
        assert ensureReady(["lung"]) and not asked
        assert not ensureReady(["nc"]), "declined"
        assert ensureReady(["nc"]) and len(asked) == 2 and "CC-BY-NC-4.0" in asked[0]
        assert ensureReady(["nc"]) and len(asked) == 2, "asked once"
        with pytest.raises(WeightError, match="missing"):
            ensureReady(["nowhere"])

    def test_the_button_to_acknowledge_shows_only_where_it_is_needed(self, panel, folders):
        assert not panel.ui.acknowledgeButton.isVisibleTo(panel.parent)
        put_weight(folders["user"], "nc", license="CC-BY-NC-4.0")
        panel.enter()
        panel.ui.weightsTable.selectRow([row[0] for row in rows(panel)].index("nc"))
        assert panel.ui.acknowledgeButton.isVisibleTo(panel.parent)
