"""Whole-lung segmentation with the shipped weights on a synthetic patient whose labels are known exactly."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.anatomy.quality import Severity
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, STRUCTURES, Lobe, Tree, lobes_from_segments
from LCTfoundLib.errors import Cancelled, UnsuitableImage, WeightError
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks.lung_segmentation import LungRequest, LungResult, Quality, segment_lungs
from LCTfoundLib.volume import Volume

if TYPE_CHECKING:
    from training.phantom.render import Rendered

pytestmark = pytest.mark.usefixtures("shipped_weights")

FAST = LungRequest(Quality.FAST, "cpu")


@pytest.fixture(scope="module")
def result(fast_result: LungResult) -> LungResult:
    return fast_result


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


class TestAgainstTheTruth:
    def test_lungs(self, result: LungResult, phantom_case: Rendered) -> None:
        assert dice(result.segments.array > 0, phantom_case.segments.array > 0) > 0.93

    @pytest.mark.parametrize("lobe", list(Lobe))
    def test_each_lobe_is_mostly_where_it_is(self, lobe: Lobe, result: LungResult, phantom_case: Rendered) -> None:
        found = lobes_from_segments(result.segments.array) == lobe
        assert dice(found, phantom_case.lobes.array == lobe) > 0.7

    def test_the_trachea_is_airway(self, result: LungResult, phantom_case: Rendered) -> None:
        outside = (phantom_case.trees.array == Tree.AIRWAY) & (phantom_case.segments.array == 0)
        core = ndimage.binary_erosion(outside)
        assert (result.trees.array[core] == Tree.AIRWAY).mean() > 0.8


class TestEveryResult:
    def test_lies_on_the_inputs_grid(self, result: LungResult, phantom_case: Rendered) -> None:
        assert result.segments.same_grid(phantom_case.ct) and result.trees.same_grid(phantom_case.ct)
        assert result.segments.array.dtype == np.uint8 and result.trees.array.dtype == np.uint8

    def test_each_segment_is_one_piece(self, result: LungResult) -> None:
        for code in np.unique(result.segments.array)[1:]:
            assert ndimage.label(result.segments.array == code)[1] == 1, STRUCTURES[code - 1].name

    def test_segments_name_only_known_codes_and_stay_in_their_lung(self, result: LungResult) -> None:
        codes = np.unique(result.segments.array)
        assert codes.max() <= 18
        x = result.segments.origin[0] + result.segments.spacing[0] * np.arange(result.segments.shape[2])
        codes_of = [np.flatnonzero(LOBE_OF_SEGMENT == lobe) for lobe in Lobe]
        weight = [np.isin(result.segments.array, wanted).sum((0, 1)) for wanted in codes_of]
        centers = [float((w * x).sum() / w.sum()) for w in weight]
        assert max(centers[:3]) < min(centers[3:])

    def test_has_a_confidence_for_each_structure_found(self, result: LungResult) -> None:
        for code in np.unique(result.segments.array)[1:]:
            assert 0.0 <= result.confidence[STRUCTURES[code - 1].key] <= 1.0
        assert {"airway", "pulmonary_artery", "pulmonary_vein"} <= set(result.confidence)

    def test_names_its_weights_and_settings(self, result: LungResult) -> None:
        assert set(result.provenance["weights"]) == {"lung_coarse", "lung_fine"}
        assert all(len(weight["sha256"]) == 64 for weight in result.provenance["weights"].values())
        assert result.provenance["quality"] == "fast"

    def test_findings_come_most_severe_first(self, result: LungResult) -> None:
        severities = [finding.severity for finding in result.findings]
        assert severities == sorted(severities, reverse=True)


class TestOrientation:
    def test_a_turned_image_gives_the_same_result_on_its_own_grid(
        self, result: LungResult, phantom_case: Rendered, rng: np.random.Generator
    ) -> None:
        ct = phantom_case.ct
        order = list(itertools.permutations(range(3)))[rng.integers(6)]
        flips = tuple(axis for axis in range(3) if rng.random() < 0.5)
        turned = turn(ct, order, flips)
        again = segment_lungs(turned, FAST)
        assert again.segments.same_grid(turned)
        expected = np.flip(result.segments.array.transpose(order), flips)
        assert (again.segments.array != expected).mean() < 1e-3


def turn(ct: Volume, order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """The same image stored with its axes in another order and direction."""
    axes = [2 - axis for axis in order]  # array axes k, j, i are world axes 2, 1, 0
    columns = np.eye(3)[:, axes[::-1]]
    origin = np.array(ct.origin)
    for axis in flips:
        source = order[axis]
        origin = origin + np.eye(3)[:, 2 - source] * ct.spacing[2 - source] * (ct.shape[source] - 1)
        columns[:, 2 - axis] *= -1
    spacing = tuple(ct.spacing[axis] for axis in axes[::-1])
    array = np.ascontiguousarray(np.flip(ct.array.transpose(order), flips))
    return Volume(array, spacing, tuple(origin), columns, dict(ct.metadata))


class TestFlags:
    def test_a_cropped_lung_is_named(self, phantom_case: Rendered) -> None:
        ct = phantom_case.ct
        lungs = np.flatnonzero((phantom_case.segments.array > 0).any(axis=(1, 2)))
        top = int(lungs[0] + 0.75 * (lungs[-1] - lungs[0]))
        cut = Volume(ct.array[:top], ct.spacing, ct.origin, ct.direction, dict(ct.metadata))
        found = segment_lungs(cut, FAST)
        assert any("cut off at the top" in finding.sentence for finding in found.findings)

    def test_a_mirrored_patient_is_serious(self, phantom_case: Rendered) -> None:
        ct = phantom_case.ct
        mirrored = ct.with_array(np.ascontiguousarray(ct.array[:, :, ::-1]))
        found = segment_lungs(mirrored, FAST)
        assert any(f.severity is Severity.SERIOUS and "mirror" in f.sentence for f in found.findings)

    def test_thick_slices_are_named(self, phantom_case: Rendered) -> None:
        ct = phantom_case.ct
        x, y, z = ct.spacing
        thick = ct.resample((x, y, 2 * z))
        found = segment_lungs(thick, FAST)
        assert any("slices are 5.0 mm apart" in finding.sentence for finding in found.findings)


class TestBadInput:
    def test_no_lungs_in_view(self, phantom_case: Rendered) -> None:
        ct = phantom_case.ct
        lungs = np.flatnonzero((phantom_case.segments.array > 0).any(axis=(1, 2)))
        abdomen = ct.with_array(ct.array[: max(4, int(lungs[0]) - 1)])
        with pytest.raises(UnsuitableImage, match="check that"):
            segment_lungs(abdomen, FAST)

    def test_missing_weights_name_the_place(self, phantom_case: Rendered, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("LCTfoundLib.weights.registry.search_folders", lambda folder=None: [])
        with pytest.raises(WeightError):
            segment_lungs(phantom_case.ct, FAST)

    def test_cancel_stops_within_the_run(self, phantom_case: Rendered) -> None:
        token = CancelToken()

        def listen(report: object) -> None:
            if getattr(report, "fraction", 0) > 0.15:
                token.cancel()

        with pytest.raises(Cancelled):
            segment_lungs(phantom_case.ct, FAST, Progress(listen, cancel=token))


def test_artery_and_vein_are_no_surer_than_the_card_allows() -> None:
    """A network may be sure and wrong: what was measured on real CTs counts."""
    from types import SimpleNamespace

    from LCTfoundLib.tasks.lung_segmentation import _mistrust_vessels

    def judged(numbers: dict) -> tuple[list, dict]:
        confidence = {"airway": 0.9, "pulmonary_artery": 0.95, "pulmonary_vein": 0.3}
        return _mistrust_vessels(SimpleNamespace(numbers=numbers), confidence), confidence

    findings, confidence = judged({"artery/vein points swapped": {"A": 0.2, "B": 0.4}})
    assert confidence == {"airway": 0.9, "pulmonary_artery": 0.6, "pulmonary_vein": 0.3}
    assert "20 to 40 %" in findings[0].sentence and findings[0].severity is Severity.WARNING
    for good in ({}, {"artery/vein points swapped": {"A": 0.05}}):
        findings, confidence = judged(good)
        assert not findings and confidence["pulmonary_artery"] == 0.95
