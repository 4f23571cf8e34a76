"""Renaming branches of a finished segmentation, and the state that travels with it."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import ndimage

from LCTfoundLib.anatomy.graph import TreeGraph
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, Lobe, Tree, segment_by_code, segments_of_lobe
from LCTfoundLib.errors import Cancelled
from LCTfoundLib.runtime.progress import CancelToken, Progress
from LCTfoundLib.tasks.lung_segmentation import LungRequest, LungResult, Quality, segment_lungs
from LCTfoundLib.tasks.relabel import BranchName, relabel
from LCTfoundLib.tasks.state import LungState, StateError, load_state, save_state
from LCTfoundLib.volume import Volume

if TYPE_CHECKING:
    from training.phantom.render import Rendered

pytestmark = [pytest.mark.usefixtures("shipped_weights"), pytest.mark.end_to_end]


@pytest.fixture(scope="module")
def result(fast_result: LungResult) -> LungResult:
    return fast_result


@pytest.fixture(scope="module")
def file(result: LungResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "state.npz"
    assert result.state is not None
    save_state(result.state, path)
    return path


@pytest.fixture
def state(file: Path) -> LungState:
    return load_state(file)


def named_branch(graph: TreeGraph, lobe: Lobe | None = None) -> tuple[int, int]:
    """First node and segment of the named subtree with the most nodes, in a lobe if one is given."""
    branches = graph.branches()
    best = (0, -1, 0)
    for branch in range(len(branches)):
        code = int(graph.segment[branches.first[branch]])
        above = branches.parent[branch]
        begins = code > 0 and (above < 0 or graph.segment[branches.last[above]] != code)
        if begins and lobe in (None, segment_by_code(code).lobe):
            size = int(branches.descendants(branch)[branches.of_node].sum())
            best = max(best, (size, int(branches.first[branch]), code))
    assert best[0], "the phantom has a named branch"
    return best[1], best[2]


def other_segment(code: int) -> int:
    """Another segment of the same lobe."""
    lobe = segment_by_code(code).lobe
    assert lobe is not None
    return next(s.code for s in segments_of_lobe(lobe) if s.code != code)


class TestState:
    def test_is_small(self, file: Path) -> None:
        assert file.stat().st_size < 4_000_000

    def test_comes_back_as_it_was(self, result: LungResult, state: LungState) -> None:
        kept = result.state
        assert kept is not None
        assert np.array_equal(state.segments.array, kept.segments.array)
        assert np.array_equal(state.trees.array, kept.trees.array)
        assert np.array_equal(state.prior.values, kept.prior.values)
        assert state.grid.same_grid(kept.grid) and state.segments.same_grid(kept.segments)
        assert state.confidence == result.confidence and state.findings == result.findings
        assert state.provenance == json.loads(json.dumps(result.provenance))
        for tree in Tree:
            for name in ("points", "radius", "parent", "segment", "generation", "confidence"):
                assert np.array_equal(getattr(state.graphs[tree], name), getattr(kept.graphs[tree], name))

    def test_gives_the_label_maps_of_the_result(self, result: LungResult, state: LungState) -> None:
        assert np.array_equal(state.segments_on_input_grid().array, result.segments.array)
        assert np.array_equal(state.trees_on_input_grid().array, result.trees.array)
        assert state.segments_on_input_grid().same_grid(result.segments)

    def test_holds_nothing_that_is_run_when_read(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)


class TestWithoutChanges:
    def test_nothing_changes(self, result: LungResult, state: LungState) -> None:
        again = relabel(state, [])
        assert np.array_equal(again.segments.array, result.segments.array) and not again.lobes
        assert again.state.findings == result.findings and again.state.confidence == result.confidence

    def test_computing_all_lobes_again_gives_the_same(self, result: LungResult, state: LungState) -> None:
        again = relabel(state, [], again=tuple(Lobe))
        assert np.array_equal(again.segments.array, result.segments.array)
        assert np.array_equal(again.trees.array, result.trees.array)
        assert set(again.state.findings) == set(result.findings)
        assert again.state.confidence == result.confidence

    def test_so_does_a_name_that_is_the_old_one(self, result: LungResult, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        again = relabel(state, [BranchName(Tree.AIRWAY, node, code)])
        assert np.array_equal(again.segments.array, result.segments.array)

    def test_also_on_another_grid(self, phantom_case: Rendered, tmp_path: Path) -> None:
        """Oblique, and with two axes the other way round."""
        angle = np.deg2rad(12.0)
        rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        direction = rotation @ np.diag([-1.0, 1.0, -1.0])
        ct = phantom_case.ct
        center = ct.world_from_index((np.array(ct.shape) - 1) / 2)
        x, y, z = center - direction @ (np.array(ct.spacing) * (np.array(ct.shape[::-1]) - 1) / 2)
        turned = ct.resample(Volume(ct.array, ct.spacing, (x, y, z), direction), pad=-1000)
        found = segment_lungs(turned, LungRequest(Quality.FAST, "cpu"))
        assert found.state is not None
        save_state(found.state, tmp_path / "state.npz")
        again = relabel(load_state(tmp_path / "state.npz"), [], again=tuple(Lobe))
        assert again.segments.same_grid(turned) and np.array_equal(again.segments.array, found.segments.array)


class TestRenaming:
    @pytest.mark.parametrize("lobe", [Lobe.RIGHT_UPPER, Lobe.LEFT_LOWER])
    def test_the_territory_goes_with_the_bronchus(self, lobe: Lobe, result: LungResult, state: LungState) -> None:
        graph = state.graphs[Tree.AIRWAY]
        node, code = named_branch(graph, lobe)
        wanted = other_segment(code)
        renamed = relabel(state, [BranchName(Tree.AIRWAY, node, wanted)])
        before, after = result.segments.array, renamed.segments.array
        assert (after == code).sum() < 0.6 * (before == code).sum()
        assert (after == wanted).sum() > (before == wanted).sum()
        moved = (before == code) & (after != code)
        assert (after[moved] == wanted).mean() > 0.8

    def test_other_lobes_stay_as_they_were(self, result: LungResult, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        lobe = segment_by_code(code).lobe
        renamed = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
        assert renamed.lobes == {lobe}
        before, after = result.segments.array, renamed.segments.array
        elsewhere = LOBE_OF_SEGMENT[before] != lobe
        assert np.array_equal(before[elsewhere], after[elsewhere])
        assert np.array_equal(LOBE_OF_SEGMENT[before], LOBE_OF_SEGMENT[after])
        assert np.array_equal(renamed.trees.array, result.trees.array)

    def test_each_segment_stays_in_one_piece(self, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        renamed = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
        for present in np.unique(renamed.segments.array)[1:]:
            assert ndimage.label(renamed.segments.array == present)[1] == 1

    def test_the_subtree_gets_the_name(self, state: LungState) -> None:
        graph = state.graphs[Tree.AIRWAY]
        node, code = named_branch(graph)
        new = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))]).state.graphs[Tree.AIRWAY]
        branches = graph.branches()
        below = branches.descendants(int(branches.of_node[node]))[branches.of_node]
        assert (new.segment[below] == other_segment(code)).all()
        assert np.array_equal(new.segment[~below], graph.segment[~below])

    def test_the_input_state_stays_as_it_was(self, state: LungState, file: Path) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
        untouched = load_state(file)
        assert np.array_equal(state.segments.array, untouched.segments.array)
        assert np.array_equal(state.graphs[Tree.AIRWAY].segment, untouched.graphs[Tree.AIRWAY].segment)
        assert np.array_equal(state.corrected, untouched.corrected) and state.findings == untouched.findings

    def test_back_again_gives_the_first_result(self, result: LungResult, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        there = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
        back = relabel(there.state, [BranchName(Tree.AIRWAY, node, code)])
        assert np.array_equal(back.segments.array, result.segments.array)

    def test_later_changes_win(self, result: LungResult, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        changes = [BranchName(Tree.AIRWAY, node, other_segment(code)), BranchName(Tree.AIRWAY, node, code)]
        both = relabel(state, changes)
        assert np.array_equal(both.segments.array, result.segments.array)

    def test_the_new_state_can_be_saved_and_is_the_new_result(self, state: LungState, tmp_path: Path) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        renamed = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
        save_state(renamed.state, tmp_path / "state.npz")
        again = load_state(tmp_path / "state.npz")
        assert np.array_equal(again.segments_on_input_grid().array, renamed.segments.array)

    def test_a_bronchus_without_a_name_is_told_as_missing(self, state: LungState) -> None:
        graph = state.graphs[Tree.AIRWAY]
        _, code = named_branch(graph)
        segment = segment_by_code(code)
        branches = graph.branches()
        changes = [BranchName(Tree.AIRWAY, int(first), 0) for first in branches.first if graph.segment[first] == code]
        findings = relabel(state, changes).state.findings
        assert any(f.structure == segment.key and f.sentence.startswith("No bronchus") for f in findings)
        assert len(findings) == len(set(findings))

    @pytest.mark.slow
    def test_takes_less_than_five_seconds_on_a_full_ct(self, state: LungState) -> None:
        extent = np.array(state.grid.spacing) * state.grid.shape[::-1]
        x, y, z = extent / (512, 512, 300)
        large = np.broadcast_to(np.uint8(0), (300, 512, 512))
        grid = Volume(large, (x, y, z), state.grid.origin, state.grid.direction)
        state = replace(state, grid=grid, corrected=state.corrected[:0], corrected_code=state.corrected_code[:0])
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            renamed = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))])
            seconds.append(time.monotonic() - start)
        assert renamed.segments.shape == (300, 512, 512) and min(seconds) < 5.0

    def test_confidence_of_other_lobes_stays(self, result: LungResult, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY])
        lobe = segment_by_code(code).lobe
        assert lobe is not None
        renamed = relabel(state, [BranchName(Tree.AIRWAY, node, other_segment(code))]).state
        mine = {segment.key for segment in segments_of_lobe(lobe)}
        for key, value in result.confidence.items():
            assert key in mine or renamed.confidence[key] == value
        assert any(renamed.confidence.get(key) != result.confidence.get(key) for key in mine)

    def test_stops_when_cancelled(self, state: LungState) -> None:
        token = CancelToken()
        progress = Progress(lambda report: token.cancel() if report.fraction > 0 else None, cancel=token)
        with pytest.raises(Cancelled):
            relabel(state, [], progress, again=tuple(Lobe))


class TestRefusals:
    def test_a_segment_of_another_lobe(self, state: LungState) -> None:
        node, code = named_branch(state.graphs[Tree.AIRWAY], Lobe.RIGHT_UPPER)
        with pytest.raises(StateError, match="lies in the right upper lobe, so it cannot be Left S6.*Right S1 apical"):
            relabel(state, [BranchName(Tree.AIRWAY, node, 15)])

    def test_the_trachea(self, state: LungState) -> None:
        root = int(np.flatnonzero(state.graphs[Tree.AIRWAY].parent < 0)[0])
        with pytest.raises(StateError, match="choose one further down"):
            relabel(state, [BranchName(Tree.AIRWAY, root, 1)])

    @pytest.mark.parametrize("branch", [-1, 10**6])
    def test_a_branch_that_is_not_there(self, branch: int, state: LungState) -> None:
        with pytest.raises(StateError, match="has no branch"):
            relabel(state, [BranchName(Tree.AIRWAY, branch, 1)])

    @pytest.mark.parametrize("segment", [-1, 19])
    def test_a_segment_that_does_not_exist(self, segment: int, state: LungState) -> None:
        with pytest.raises(StateError, match="no segment"):
            relabel(state, [BranchName(Tree.AIRWAY, 0, segment)])

    def test_veins(self, state: LungState) -> None:
        with pytest.raises(StateError, match="Veins supply no segment"):
            relabel(state, [BranchName(Tree.VEIN, 0, 1)])


def altered(file: Path, target: Path, **arrays: Any) -> Path:
    """A copy of a state file with some arrays replaced; None leaves one out."""
    with np.load(file) as old:
        content = {name: old[name] for name in old}
    for key, value in arrays.items():
        name = key.replace("__", ".")
        if value is None:
            del content[name]
        else:
            content[name] = value(content[name]) if callable(value) else value
    np.savez_compressed(target, **content)
    return target


def first_is(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.ravel()[0] = value
        return array

    return change


class TestUntrustedFiles:
    @pytest.mark.parametrize(
        "change",
        [
            {"segments": None},
            {"segments": first_is(200)},
            {"segments": lambda a: a.astype(np.int32)},
            {"segments": lambda a: a[0]},
            {"segments": lambda a: a.astype(object)},
            {"trees": first_is(9)},
            {"trees": lambda a: a[:-1]},
            {"prior": lambda a: a[:5]},
            {"grid__shape": np.array([10**6, 10**6, 10**6])},
            {"grid__shape": np.array([0, 5, 5])},
            {"grid__spacing": first_is(np.nan)},
            {"grid__spacing": first_is(-1.0)},
            {"grid__direction": np.ones((3, 3))},
            {"grid__direction": first_is(np.inf)},
            {"work__origin": first_is(1e30)},
            {"airway__parent": lambda a: a + 5},
            {"airway__parent": first_is(-2)},
            {"airway__points": first_is(np.nan)},
            {"airway__segment": first_is(19)},
            {"artery__radius": first_is(-1.0)},
            {"artery__generation": first_is(10**9)},
            {"vein__confidence": lambda a: np.full(3, 0.5)},
            {"vein__confidence": first_is(np.nan)},
            {"artery__given": first_is(-1)},
            {"corrected": np.array([10**15]), "corrected_code": np.array([1], np.uint8)},
            {"corrected": np.array([0]), "corrected_code": np.array([19], np.uint8)},
            {"corrected": np.array([0, 1]), "corrected_code": np.array([1], np.uint8)},
            {"facts": np.frombuffer(b"[1, 2]", np.uint8)},
            {"facts": np.frombuffer(b"\xff\xfe", np.uint8)},
            {"facts": np.frombuffer(b"[" * 100_000, np.uint8)},
            {"facts": np.frombuffer(b'{"confidence": {"airway": 7}, "findings": [], "provenance": {}}', np.uint8)},
            {"facts": np.frombuffer(b'{"confidence": {}, "findings": [[9, "a", "b"]], "provenance": {}}', np.uint8)},
        ],
        ids=lambda change: "-".join(change),
    )
    def test_what_makes_no_sense_is_refused(self, change: dict[str, Any], file: Path, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="segment the CT again"):
            load_state(altered(file, tmp_path / "state.npz", **change))

    def test_another_version_is_named(self, file: Path, tmp_path: Path) -> None:
        with pytest.raises(StateError, match=r"another version \(7\)"):
            load_state(altered(file, tmp_path / "state.npz", format=np.array([7])))

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StateError, match="There is no file"):
            load_state(tmp_path / "none.npz")

    def test_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / "state.npz").write_bytes(b"nonsense" * 100)
        with pytest.raises(StateError, match="damaged"):
            load_state(tmp_path / "state.npz")

    def test_a_file_cut_anywhere_or_with_flipped_bytes(
        self, file: Path, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        content, path = file.read_bytes(), tmp_path / "state.npz"
        for _ in range(20):
            path.write_bytes(content[: int(rng.integers(len(content)))])
            with pytest.raises(StateError):
                load_state(path)
        for _ in range(20):
            damaged = bytearray(content)
            for place in rng.integers(len(content), size=20):
                damaged[place] ^= 0xFF
            path.write_bytes(damaged)
            try:
                load_state(path)  # bytes between the members do not matter
            except StateError:
                pass

    def test_a_header_that_promises_a_giant_array_takes_no_memory(self, file: Path, tmp_path: Path) -> None:
        target = tmp_path / "state.npz"
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
            for info in old.infolist():
                content = old.read(info)
                if info.filename == "segments.npy":
                    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (900000, 900000, 900000), }"
                    content = b"\x93NUMPY\x01\x00" + len(header.ljust(117) + "\n").to_bytes(2, "little")
                    content += (header.ljust(117) + "\n").encode() + b"\0" * 1000
                new.writestr(info.filename, content)
        with pytest.raises(StateError, match="cut off"):
            load_state(target)

    @pytest.mark.alone
    def test_an_archive_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(self, tmp_path: Path) -> None:
        target = tmp_path / "state.npz"
        block = b"\0" * 2**24
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("segments.npy", "w") as member:
            for _ in range(70):
                member.write(block)
        start = time.monotonic()
        with pytest.raises(StateError, match="larger than a state can be"):
            load_state(target)
        assert time.monotonic() - start < 1.0
