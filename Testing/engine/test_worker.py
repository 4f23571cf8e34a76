"""The worker as a real process: what it says, what it refuses, what it leaves behind, and when it ends."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from LCTfoundLib import __version__, worker
from LCTfoundLib.anatomy.structures import LOBE_OF_SEGMENT, STRUCTURES, segment_by_code, segments_of_lobe
from LCTfoundLib.reconstruction_case import SliceChoice
from LCTfoundLib.tasks.state import load_state
from LCTfoundLib.volume import Volume

pytestmark = pytest.mark.alone

if TYPE_CHECKING:
    from training.phantom.render import Rendered

REPOSITORY = Path(__file__).resolve().parents[2]
PLAIN = [sys.executable, "-m", "LCTfoundLib", "worker"]
EXTRA = [sys.executable, str(REPOSITORY / "Testing" / "extra_worker.py")]
LAST = ("result", "error", "cancelled")


class Conversation:
    """A worker process and what it says."""

    def __init__(self, command: list[str], scratch: Path) -> None:
        self.scratch = scratch
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "LCTFOUND_SCRATCH": str(scratch)}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=scratch,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.events: queue.Queue[dict[str, Any]] = queue.Queue()
        self.errors = b""
        self._count = 0
        self._readers = [threading.Thread(target=target, daemon=True) for target in (self._read, self._hear)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))  # nothing but events may come

    def _hear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors += line

    def write(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def ask(self, task: str, **fields: Any) -> str:
        """Send a request and return its id."""
        self._count += 1
        name = fields.pop("id", f"{task}-{self._count}")
        self.write(json.dumps({"task": task, "id": name, **fields}).encode() + b"\n")
        return name

    def hear(self, *kinds: str, timeout: float = 60.0) -> dict[str, Any]:
        """The next event of some kinds; all in between are dropped."""
        end = time.monotonic() + timeout
        while True:
            event = self.events.get(timeout=max(0.001, end - time.monotonic()))
            if not kinds or event["event"] in kinds:
                return event

    def answer(self, task: str, timeout: float = 120.0, **fields: Any) -> dict[str, Any]:
        """Do a job and return its last event."""
        name = self.ask(task, **fields)
        last = self.hear(*LAST, timeout=timeout)
        assert last["id"] == name
        return last

    def silent(self) -> bool:
        """Whether nothing more comes before the answer to another request."""
        name = self.ask("doctor")
        first = self.hear()
        last = self.hear(*LAST)
        return first == {"event": "started", "id": name} and last["event"] == "result"

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, shipped_weights: None) -> Iterator[Conversation]:
    """A warm worker that all tests of this file share: whatever one asks, it must live on for the next."""
    conversation = Conversation(PLAIN, tmp_path_factory.mktemp("scratch"))
    conversation.hear("ready")
    yield conversation
    conversation.close()


@pytest.fixture(scope="module")
def extra(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversation]:
    """The same with more tasks."""
    conversation = Conversation(EXTRA, tmp_path_factory.mktemp("extra"))
    conversation.hear("ready", "error")
    yield conversation
    conversation.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Conversation]:
    """A worker with more tasks for one test, to be ended."""
    conversation = Conversation(EXTRA, tmp_path)
    conversation.hear("ready", "error")
    yield conversation
    conversation.close()


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def sent(ct: Volume, folder: Path, name: str = "ct.npy") -> dict[str, Any]:
    """The ``input`` of a request."""
    np.save(folder / name, ct.array)
    return {
        "array": str(folder / name),
        "spacing": list(ct.spacing),
        "origin": list(ct.origin),
        "direction": ct.direction.ravel().tolist(),
        "metadata": {},
    }


class TestStart:
    def test_says_hello_before_it_loads_anything_heavy(self, tmp_path: Path, shipped_weights: None) -> None:
        conversation = Conversation(PLAIN, tmp_path)
        hello = conversation.hear(timeout=10.0)
        took = time.monotonic() - conversation.started
        loaded = {Path(m.path).name for m in psutil.Process(conversation.process.pid).memory_maps()}
        ready = conversation.hear()
        warm = time.monotonic() - conversation.started
        conversation.close()
        print(f"hello after {took:.3f} s, ready after {warm:.2f} s")
        assert hello == {
            "event": "hello",
            "protocol": 1,
            "version": __version__,
            "pid": conversation.process.pid,
        }
        assert not any("torch" in name for name in loaded) and took < 2.0
        assert ready["event"] == "ready" and ready["device"]["device"] in ("cpu", "cuda", "mps")

    def test_tells_when_the_weights_are_missing_and_serves_what_needs_none(self, tmp_path: Path) -> None:
        script = (
            "import LCTfoundLib.weights.registry as r; r.search_folders = lambda folder=None: []; "
            "import LCTfoundLib.worker_jobs as j; j.search_folders = r.search_folders; "
            "import LCTfoundLib.worker as w; w.main()"
        )
        conversation = Conversation([sys.executable, "-c", script], tmp_path)
        error = conversation.hear("ready", "error")
        assert error["event"] == "error" and error["kind"] == "weight" and error["id"] is None
        assert conversation.answer("doctor")["event"] == "result"
        conversation.close()

    def test_leaves_the_window_the_right_of_way(self, plain: Conversation) -> None:
        assert psutil.Process(plain.process.pid).nice() >= min(19, psutil.Process().nice() + 5)

    @pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (3, 2), (8, 7)])
    def test_leaves_one_core_free_where_there_are_more_than_two(
        self, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        assert worker.thread_count() == threads

    def test_torch_keeps_to_that(self, extra: Conversation) -> None:
        answer = extra.answer("threads")
        assert answer["torch"] <= answer["wanted"]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (b"nonsense", "one JSON object a line"),
            (b"[1, 2]", "one JSON object a line"),
            (b'"text"', "one JSON object a line"),
            (b"\xff\xfe\x00\x01", "one JSON object a line"),
            (b"[" * 200_000, "one JSON object a line"),
            (b'{"task": "doctor"}', "needs an 'id'"),
            (b'{"task": "doctor", "id": 5}', "needs an 'id'"),
            (b'{"task": "doctor", "id": ""}', "needs an 'id'"),
            (b'{"task": "doctor", "id": "' + b"x" * 1000 + b'"}', "needs an 'id'"),
            (b'{"id": "' + b"x" * (2**24 + 1000) + b'"}', "one JSON object a line"),
        ],
        ids=lambda value: str(value[:20]),
    )
    def test_what_is_no_request(self, line: bytes, says: str, plain: Conversation) -> None:
        plain.write(line + b"\n")
        error = plain.hear()
        assert error["event"] == "error" and error["kind"] == "request" and error["id"] is None
        assert says in error["message"]
        assert plain.silent()

    @pytest.mark.parametrize(
        ("task", "fields", "says"),
        [
            ("fly", {}, "There is no task 'fly'; choose from segment_lungs"),
            (None, {}, "There is no task 'None'"),
            (["doctor"], {}, "There is no task"),
            ("segment_lungs", {}, "'output' must be a text"),
            ("segment_lungs", {"output": "relative"}, "'output' must be an absolute path"),
            ("segment_lungs", {"output": "/elsewhere/result"}, "lies outside of the session's folder"),
            ("segment_lungs", {"output": "{scratch}/../result"}, "lies outside of the session's folder"),
            ("segment_lungs", {"output": "{scratch}/a", "input": []}, "'input' must be an object"),
            ("segment_lungs", {"output": "{scratch}/a", "input": {}}, "'array' must be a text"),
            ("segment_lungs", {"output": "{scratch}/a", "input": {"array": "{scratch}/no.npy"}}, "There is no file"),
            ("segment_lungs", {"output": "{scratch}/a", "options": {"quality": "best"}}, "no quality 'best'"),
            ("relabel", {"output": "{scratch}/a", "state": "{scratch}/no.npz"}, "There is no file"),
            ("relabel", {"output": "{scratch}/a", "changes": [7]}, "'tree' must be a text"),
            ("relabel", {"output": "{scratch}/a", "changes": [{"tree": "bone"}]}, "no tree 'bone'"),
            ("relabel", {"output": "{scratch}/a", "changes": [{"tree": "airway", "branch": 1.5}]}, "a whole number"),
            ("relabel", {"output": "{scratch}/a", "lobes": [6]}, "codes from 1 to 5"),
            ("sparse_view", {"output": "{scratch}/a", "options": {"tier": "worst"}}, "no tier 'worst'"),
            ("sparse_view", {"output": "{scratch}/a", "source_dicom": [5]}, "'source_dicom' must hold texts"),
            ("sparse_view", {"output": "/elsewhere/result"}, "lies outside of the session's folder"),
            ("low_dose", {"output": "{scratch}/a", "options": {"strength": "much"}}, "'strength' must be a finite"),
            ("super_resolution", {"output": "{scratch}/a", "options": {"simulate": 1}}, "must be true or false"),
            ("export_series", {"folder": "{scratch}/a", "marks": {"title": 5}}, "'title' must be a text"),
            ("export", {"folder": "relative"}, "'folder' must be an absolute path"),
            ("export", {"folder": "{scratch}/a", "options": {"formats": ["docx"]}}, "no format 'docx'"),
            ("export", {"folder": "{scratch}/a", "options": {"polygons": 5}}, "no export option 'polygons'"),
        ],
    )
    def test_what_cannot_be_understood(self, task: Any, fields: dict[str, Any], says: str, plain: Conversation) -> None:
        filled = json.loads(json.dumps(fields).replace("{scratch}", str(plain.scratch)))
        error = plain.answer(task, id="bad", **filled)
        assert error["event"] == "error" and error["kind"] == "request" and error["log"] is None
        assert says in error["message"] and error["message"].count("\n") == 0
        assert plain.silent() and not (plain.scratch / "a").exists()

    def test_an_id_that_is_in_use(self, extra: Conversation) -> None:
        extra.ask("obedient", id="twin", output=str(extra.scratch / "twin"))
        extra.hear("progress")
        extra.ask("doctor", id="twin")
        refusal = extra.hear("error", "result")
        assert refusal["event"] == "error" and refusal["id"] is None and "already" in refusal["message"]
        extra.write(b'{"task": "cancel", "id": "twin"}\n')
        assert extra.hear(*LAST) == {"event": "cancelled", "id": "twin"}

    def test_a_cancel_of_what_is_over_or_never_was(self, plain: Conversation) -> None:
        plain.write(b'{"task": "cancel", "id": "nobody"}\n')
        assert plain.silent()


class TestBadImages:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"spacing": [1, 1]}, "'spacing' must be 3 finite numbers"),
            ({"spacing": [1, 1, float("nan")]}, "'spacing' must be 3 finite numbers"),
            ({"spacing": [1, 1, -1]}, "geometry cannot be used"),
            ({"direction": [1.0] * 9}, "geometry cannot be used"),
            ({"direction": None}, "'direction' must be 9 finite numbers"),
            ({"metadata": {"Modality": "MR"}}, "This is a MR image"),
        ],
    )
    def test_wrong_geometry_or_modality(
        self, change: dict[str, Any], says: str, plain: Conversation, simple_chest: Volume
    ) -> None:
        image = sent(simple_chest, plain.scratch) | change
        error = plain.answer("segment_lungs", input=image, output=str(plain.scratch / "out"))
        assert error["event"] == "error" and error["kind"] in ("request", "unsuitable_image")
        assert says in error["message"]
        assert not (plain.scratch / "out").exists()

    @pytest.mark.parametrize(
        ("array", "kind", "says"),
        [
            (np.zeros((40, 50), np.int16), "unsuitable_image", "2 dimensions"),
            (np.zeros((1, 50, 60), np.int16), "unsuitable_image", "single slice"),
            (np.zeros((50, 50, 60), np.float32), "unsuitable_image", "all 0"),
            (np.full((50, 50, 60), np.nan, np.float32), "unsuitable_image", "no numbers"),
            (np.zeros((50, 50, 60), np.complex64), "unsuitable_image", "no plain numbers"),
            (np.zeros((50, 50, 60), "U3"), "unsuitable_image", "no plain numbers"),
            (np.zeros((0, 50, 60), np.int16), "unsuitable_image", "too small"),
            (np.array([[[{}]]], dtype=object), "request", "no array file"),
        ],
    )
    def test_no_ct(self, array: np.ndarray, kind: str, says: str, plain: Conversation, simple_chest: Volume) -> None:
        image = sent(simple_chest, plain.scratch)
        np.save(plain.scratch / "ct.npy", array, allow_pickle=True)
        error = plain.answer("segment_lungs", input=image, output=str(plain.scratch / "out"))
        assert error["event"] == "error" and error["kind"] == kind and says in error["message"]

    def test_a_file_that_is_no_array(self, plain: Conversation, simple_chest: Volume) -> None:
        image = sent(simple_chest, plain.scratch)
        for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i2'}", os.urandom(5000)):
            (plain.scratch / "ct.npy").write_bytes(content)
            error = plain.answer("segment_lungs", input=image, output=str(plain.scratch / "out"))
            assert error["event"] == "error" and error["kind"] == "request" and "write it again" in error["message"]

    def test_an_array_that_was_cut_off(self, plain: Conversation, simple_chest: Volume) -> None:
        image = sent(simple_chest, plain.scratch)
        content = (plain.scratch / "ct.npy").read_bytes()
        (plain.scratch / "ct.npy").write_bytes(content[: len(content) // 2])
        error = plain.answer("segment_lungs", input=image, output=str(plain.scratch / "out"))
        assert error["event"] == "error" and error["kind"] == "request" and "damaged" in error["message"]

    def test_label_maps_of_another_size(self, plain: Conversation, simple_chest: Volume, tmp_path: Path) -> None:
        image = sent(simple_chest, plain.scratch)
        labels = plain.scratch / "labels.npy"
        np.save(labels, np.zeros((3, 4, 5), np.uint8))
        error = plain.answer(
            "export", input=image, segments=str(labels), trees=str(labels), folder=str(tmp_path / "out")
        )
        assert error["kind"] == "request" and "with the CT's size" in error["message"]
        assert not (tmp_path / "out").exists()

    def test_missing_weights(self, plain: Conversation, simple_chest: Volume, tmp_path: Path) -> None:
        image, options = sent(simple_chest, plain.scratch), {"weights_folder": str(tmp_path / "none")}
        error = plain.answer("segment_lungs", input=image, options=options, output=str(plain.scratch / "out"))
        assert error["event"] == "error" and error["kind"] == "weight" and "none" in error["message"]

    def test_an_output_that_is_there_already_stays_as_it_was(self, plain: Conversation, simple_chest: Volume) -> None:
        old = plain.scratch / "old"
        old.mkdir()
        (old / "precious").write_text("content")
        labels = np.where(simple_chest.array < -500, 1, 0).astype(np.uint8)
        for name in ("segments", "trees"):
            np.save(plain.scratch / f"{name}.npy", labels)
        (old / "manifest.json").write_text("{}")
        error = plain.answer(
            "export",
            input=sent(simple_chest, plain.scratch),
            segments=str(plain.scratch / "segments.npy"),
            trees=str(plain.scratch / "trees.npy"),
            options={"formats": ["csv"]},
            folder=str(old),
        )
        assert error["kind"] == "output" and "manifest.json" in error["message"]
        assert sorted(path.name for path in old.iterdir()) == ["manifest.json", "precious"]


class TestTrouble:
    @pytest.mark.parametrize("library", ["python", "numpy", "torch"])
    def test_memory_that_runs_out(self, library: str, extra: Conversation) -> None:
        error = extra.answer("hungry", of=library)
        assert error["event"] == "error" and error["kind"] == "out_of_memory"
        assert "close other programs" in error["message"]
        assert extra.silent()

    @pytest.mark.parametrize(("task", "name"), [("broken", "ZeroDivisionError"), ("leaving", "SystemExit")])
    def test_a_bug_leaves_a_log(self, task: str, name: str, extra: Conversation) -> None:
        error = extra.answer(task)
        log = Path(error["log"])
        content = log.read_text(encoding="utf-8")
        log.unlink()
        assert error["kind"] == "internal" and name in error["message"] and str(log) in error["message"]
        assert "Traceback" in content and name in content and f"task: {task}" in content
        assert extra.silent()

    def test_a_result_that_cannot_be_told(self, extra: Conversation) -> None:
        error = extra.answer("unspeakable")
        assert error["event"] == "error" and error["kind"] == "internal"
        Path(error["log"]).unlink()
        assert extra.silent()

    def test_what_libraries_print_does_not_disturb_the_conversation(self, extra: Conversation) -> None:
        answer = extra.answer("noisy")
        assert answer["event"] == "result" and answer["input"] == ""  # nor can they read requests
        assert extra.silent()
        for noise in (b"python noise", b"stdout noise", b"descriptor noise", b"child noise"):
            assert noise in extra.errors


class TestCancel:
    def test_a_running_job_stops_and_leaves_nothing(self, extra: Conversation) -> None:
        before = set(extra.scratch.iterdir())
        name = extra.ask("obedient", output=str(extra.scratch / "gone"))
        extra.hear("progress")
        extra.write(json.dumps({"task": "cancel", "id": name}).encode() + b"\n")
        start = time.monotonic()
        assert extra.hear(*LAST) == {"event": "cancelled", "id": name}
        assert time.monotonic() - start < 0.5
        assert set(extra.scratch.iterdir()) == before

    def test_a_waiting_job_is_taken_back_at_once(self, extra: Conversation) -> None:
        running = extra.ask("obedient", output=str(extra.scratch / "one"))
        waiting = extra.ask("doctor")
        extra.hear("progress")
        extra.write(json.dumps({"task": "cancel", "id": waiting}).encode() + b"\n")
        assert extra.hear(*LAST) == {"event": "cancelled", "id": waiting}
        extra.write(json.dumps({"task": "cancel", "id": running}).encode() + b"\n")
        assert extra.hear(*LAST) == {"event": "cancelled", "id": running}
        assert extra.silent()

    def test_jobs_are_done_in_their_order(self, plain: Conversation) -> None:
        names = [plain.ask("doctor") for _ in range(5)]
        assert [plain.hear(*LAST)["id"] for _ in names] == names


class TestEnd:
    @pytest.mark.parametrize("task", ["obedient", "stubborn"])
    def test_the_end_of_its_input_ends_it_in_the_middle_of_a_job(self, task: str, own: Conversation) -> None:
        own.ask(task, output=str(own.scratch / "out"))
        own.hear("progress")
        assert own.process.stdin is not None
        own.process.stdin.close()
        assert ends_within(own.process, 1.0)
        if task == "obedient":
            assert not list(own.scratch.glob(".*out"))

    def test_so_it_does_while_idle(self, own: Conversation) -> None:
        assert own.process.stdin is not None
        own.process.stdin.close()
        assert ends_within(own.process, 1.0) and own.process.returncode == 0

    def test_so_it_does_while_it_warms_up(self, tmp_path: Path) -> None:
        conversation = Conversation(PLAIN, tmp_path)
        conversation.hear("hello")
        assert conversation.process.stdin is not None
        conversation.process.stdin.close()
        assert ends_within(conversation.process, 1.5)
        conversation.close()

    def test_quit(self, own: Conversation) -> None:
        own.write(b'{"task": "quit"}\n')
        assert ends_within(own.process, 1.0) and own.process.returncode == 0

    def test_events_that_nobody_reads_end_it(self, tmp_path: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(PLAIN, cwd=tmp_path, env=environment, **pipes) as process:
            assert process.stdout is not None
            assert b"hello" in process.stdout.readline()
            process.stdout.close()  # before it is ready, which it will want to tell
            assert ends_within(process, 30.0) and process.returncode == 1


# -- real jobs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(plain: Conversation, phantom_case: Rendered) -> Path:
    """The output folder of a segmentation at quality fast."""
    output = plain.scratch / "segmented"
    start = time.monotonic()
    name = plain.ask(
        "segment_lungs",
        input=sent(phantom_case.ct, plain.scratch, "phantom.npy"),
        options={"quality": "fast", "device": "cpu"},
        output=str(output),
    )
    assert plain.hear() == {"event": "started", "id": name}
    first = plain.hear()
    print(f"first progress after {time.monotonic() - start:.3f} s")
    assert first["event"] == "progress" and time.monotonic() - start < 1.0
    fractions, stages = [first["fraction"]], [first["stage"]]
    while (event := plain.hear(timeout=300.0))["event"] == "progress":
        assert set(event) == {"event", "id", "stage", "fraction", "elapsed", "seconds_left"}
        fractions.append(event["fraction"])
        stages.append(event["stage"])
    assert event == {"event": "result", "id": name, "folder": str(output)}
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert {"Checking the CT", "Fine network", "Writing the result"} <= set(stages)
    return output


def keys(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.end_to_end
class TestSegmentation:
    def test_writes_what_the_protocol_says_and_nothing_else(self, segmented: Path, plain: Conversation) -> None:
        names = {"segments.npy", "trees.npy", "meshes.npz", "graphs.npz", "state.npz", "result.json"}
        assert {path.name for path in segmented.iterdir()} == names
        assert not [path for path in plain.scratch.iterdir() if path.name.startswith(".")]

    def test_label_maps_lie_on_the_inputs_grid(self, segmented: Path, phantom_case: Rendered) -> None:
        for name, most in (("segments", 18), ("trees", 3)):
            labels = np.load(segmented / f"{name}.npy", allow_pickle=False)
            assert labels.shape == phantom_case.ct.shape and labels.dtype == np.uint8 and labels.max() <= most
        segments = np.load(segmented / "segments.npy")
        truth = phantom_case.segments.array > 0
        assert 2 * ((segments > 0) & truth).sum() / ((segments > 0).sum() + truth.sum()) > 0.93

    def test_meshes_have_points_faces_and_outward_normals(self, segmented: Path, phantom_case: Rendered) -> None:
        total = 0
        segments = np.load(segmented / "segments.npy")
        with np.load(segmented / "meshes.npz", allow_pickle=False) as meshes:
            found = {name.rpartition(".")[0] for name in meshes}
            for key in found:
                points, faces, normals = (meshes[f"{key}.{part}"] for part in ("points", "faces", "normals"))
                assert (points.dtype, faces.dtype, normals.dtype) == (np.float32, np.int32, np.float32)
                assert faces.min() == 0 and faces.max() == len(points) - 1 and normals.shape == points.shape
                assert np.allclose(np.linalg.norm(normals, axis=1), 1.0, atol=1e-3)
                corners = points[faces].astype(float)
                across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
                assert np.einsum("ij,ij->", corners[:, 0], across) > 0  # closed, seen from outside
                agree = np.einsum("ij,ij->i", across, normals[faces].mean(axis=1))
                assert (agree > 0).mean() > 0.95
                total += len(faces)
            right = meshes["right_s01.points"].mean(axis=0)
        assert total <= 600_000
        assert found == {segment_by_code(int(c)).key for c in np.unique(segments)[1:]} | {
            s.key for s in STRUCTURES[18:]
        }
        place = phantom_case.ct.world_from_index(np.argwhere(segments == 1)).mean(axis=0)
        assert np.linalg.norm(right - place) < 15.0

    def test_graphs_lie_in_their_trees(self, segmented: Path, phantom_case: Rendered) -> None:
        trees = np.load(segmented / "trees.npy")
        with np.load(segmented / "graphs.npz", allow_pickle=False) as graphs:
            for code, tree in enumerate(("airway", "artery", "vein"), start=1):
                points, parent = graphs[f"{tree}.points"], graphs[f"{tree}.parent"]
                assert all(len(graphs[f"{tree}.{n}"]) == len(points) for n in ("radius", "segment", "generation"))
                assert (parent < np.arange(len(parent))).all()
                index = np.rint(phantom_case.ct.index_from_world(points)).astype(int)
                index = np.clip(index, 0, np.array(trees.shape) - 1)
                assert (trees[tuple(index.T)] == code).mean() > 0.6

    def test_the_state_gives_the_same_label_maps(self, segmented: Path) -> None:
        state = load_state(segmented / "state.npz")
        assert np.array_equal(state.segments_on_input_grid().array, np.load(segmented / "segments.npy"))
        assert np.array_equal(state.trees_on_input_grid().array, np.load(segmented / "trees.npy"))
        assert (segmented / "state.npz").stat().st_size < 4_000_000

    def test_the_numbers_fit_the_label_maps(self, segmented: Path, phantom_case: Rendered) -> None:
        result, segments = keys(segmented), np.load(segmented / "segments.npy")
        rows = {row["key"]: row for row in result["volumes"]}
        for structure in STRUCTURES[:18]:
            expected = (segments == structure.code).sum() * phantom_case.ct.voxel_ml
            assert rows[structure.key]["volume"] == pytest.approx(expected)
        assert rows["lungs"]["volume"] == pytest.approx((segments > 0).sum() * phantom_case.ct.voxel_ml)
        assert -950 < rows["lungs"]["mean_hu"] < -500
        assert all(0 <= value <= 1 for value in result["confidence"].values())
        assert result["provenance"]["quality"] == "fast" and "lung_fine" in result["provenance"]["weights"]
        for finding in result["findings"]:
            assert set(finding) == {"severity", "name", "structure", "sentence"}
            assert finding["name"] == ("note", "warning", "serious")[finding["severity"]]

    def test_tells_what_had_to_be_mended(self, plain: Conversation, phantom_case: Rendered) -> None:
        array = phantom_case.ct.array.astype(np.float32)
        array[3, 4, 5:10] = np.nan
        name = plain.ask(
            "segment_lungs",
            input=sent(phantom_case.ct.with_array(array), plain.scratch),
            options={"quality": "fast", "device": "cpu"},
            output=str(plain.scratch / "mended"),
        )
        warning = plain.hear("warning", *LAST)
        assert (
            warning["event"] == "warning"
            and warning["id"] == name
            and warning["message"].startswith("5 voxels without a value")
        )
        plain.write(json.dumps({"task": "cancel", "id": name}).encode() + b"\n")
        assert plain.hear(*LAST, timeout=60) == {"event": "cancelled", "id": name}
        assert not (plain.scratch / "mended").exists()

    def test_memory_that_runs_out_in_the_middle_costs_only_the_job(
        self, plain: Conversation, phantom_case: Rendered
    ) -> None:
        process = psutil.Process(plain.process.pid)
        if not hasattr(process, "rlimit"):
            pytest.skip("the system cannot limit a running process")
        free = process.rlimit(psutil.RLIMIT_AS)
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 40_000_000, free[1]))
        error = plain.answer(
            "segment_lungs",
            timeout=300.0,
            input=sent(phantom_case.ct, plain.scratch),
            options={"quality": "fast", "device": "cpu"},
            output=str(plain.scratch / "hungry"),
        )
        process.rlimit(psutil.RLIMIT_AS, free)
        assert error["event"] == "error" and error["kind"] == "out_of_memory", error
        assert not (plain.scratch / "hungry").exists() and plain.silent()


@pytest.mark.end_to_end
class TestRelabeling:
    def renamed(self, plain: Conversation, segmented: Path, **fields: Any) -> Path:
        output = plain.scratch / f"renamed-{time.monotonic_ns()}"
        answer = plain.answer("relabel", state=str(segmented / "state.npz"), output=str(output), **fields)
        assert answer["event"] == "result", answer
        return output

    def test_a_bronchus_takes_its_territory_along(
        self, plain: Conversation, segmented: Path, phantom_case: Rendered
    ) -> None:
        graphs = np.load(segmented / "graphs.npz")
        code = int(np.bincount(graphs["airway.segment"][graphs["airway.segment"] > 0]).argmax())
        lobe = segment_by_code(code).lobe
        assert lobe is not None
        wanted = next(s.code for s in segments_of_lobe(lobe) if s.code != code)
        first = int(np.flatnonzero(graphs["airway.segment"] == code)[0])
        change = {"tree": "airway", "branch": first, "segment": wanted}
        image = sent(phantom_case.ct, plain.scratch)
        output = self.renamed(plain, segmented, changes=[change], ct=image)
        before, after = np.load(segmented / "segments.npy"), np.load(output / "segments.npy")
        assert ((before == code) & (after == wanted)).sum() > 0.5 * (before == code).sum()
        elsewhere = LOBE_OF_SEGMENT[before] != lobe
        assert np.array_equal(before[elsewhere], after[elsewhere])
        old, new = keys(segmented), keys(output)
        assert new["lobes"] == [int(lobe)]
        of = lambda result: {row["key"]: row for row in result["volumes"]}  # noqa: E731
        for key, row in of(old).items():
            if key not in {s.key for s in segments_of_lobe(lobe)}:
                assert of(new)[key] == row
        assert of(new)[segment_by_code(wanted).key]["volume"] > of(old)[segment_by_code(wanted).key]["volume"]
        with np.load(output / "meshes.npz") as meshes:
            found = {name.rpartition(".")[0] for name in meshes}
        assert found <= {s.key for s in segments_of_lobe(lobe)} and segment_by_code(wanted).key in found

    def test_without_a_ct_the_mean_hu_is_unknown(self, plain: Conversation, segmented: Path) -> None:
        output = self.renamed(plain, segmented, ct=None, lobes=[1])
        assert np.array_equal(np.load(output / "segments.npy"), np.load(segmented / "segments.npy"))
        rows, old = keys(output)["volumes"], keys(segmented)["volumes"]
        assert all(row["mean_hu"] is None for row in rows)
        assert [row["volume"] for row in rows] == [row["volume"] for row in old]
        with np.load(output / "meshes.npz") as meshes:  # those of a change that was taken back are made again
            assert "right_s01.points" in meshes and "left_s06.points" not in meshes

    def test_another_ct_is_refused(self, plain: Conversation, segmented: Path, simple_chest: Volume) -> None:
        error = plain.answer(
            "relabel",
            state=str(segmented / "state.npz"),
            ct=sent(simple_chest, plain.scratch),
            output=str(plain.scratch / "other"),
        )
        assert error["kind"] == "request" and "not the one that was segmented" in error["message"]

    def test_a_damaged_state_is_refused(self, plain: Conversation, segmented: Path) -> None:
        damaged = plain.scratch / "damaged.npz"
        damaged.write_bytes((segmented / "state.npz").read_bytes()[:5000])
        error = plain.answer("relabel", state=str(damaged), output=str(plain.scratch / "other"))
        assert error["kind"] == "request" and "segment the CT again" in error["message"]


@pytest.mark.end_to_end
class TestExport:
    def test_what_was_chosen_is_written(
        self, plain: Conversation, segmented: Path, phantom_case: Rendered, tmp_path: Path
    ) -> None:
        result = keys(segmented)
        answer = plain.answer(
            "export",
            input=sent(phantom_case.ct, plain.scratch),
            segments=str(segmented / "segments.npy"),
            trees=str(segmented / "trees.npy"),
            confidence=result["confidence"],
            findings=result["findings"],
            provenance=result["provenance"],
            options={"formats": ["stl", "csv"], "structures": ["airway"], "triangles": 20000, "frame": "RAS"},
            case="Phantom",
            folder=str(tmp_path / "export"),
        )
        assert answer["event"] == "result" and answer["folder"] == str(tmp_path / "export")
        files = {p.relative_to(tmp_path / "export").as_posix() for p in (tmp_path / "export").rglob("*.*")}
        assert "volumes.csv" in files and any(name.endswith("airway.stl") for name in files)
        assert not any("right_s01" in name for name in files)
        manifest = json.loads((tmp_path / "export" / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["case"] == "Phantom"


class TestSlicesAroundAPlace:
    def test_they_lie_around_it_as_far_as_there_are_slices(self, rng: np.random.Generator) -> None:
        """Also for a place outside, and in whole groups where slices are put together to thick ones."""
        ct = Volume(np.zeros((23, 4, 4), np.int16), (2.0, 2.0, 3.0), (5.0, -7.0, 100.0))
        for _ in range(50):
            height, count, group = rng.uniform(60, 210), int(rng.integers(1, 30)), int(rng.integers(1, 6))
            chosen = SliceChoice.around(ct, (0.0, 0.0, height), count, group).of(23)
            assert len(chosen) % group == 0
            assert len(chosen) == min(-(-count // group) * group, 23 - 23 % group)
            assert 0 <= chosen.start and chosen.stop <= 23
            slice_at = min(max(round((height - 100.0) / 3.0), 0), 22)
            assert slice_at in chosen
