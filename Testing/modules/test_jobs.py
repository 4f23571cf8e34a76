"""The job runner with real worker processes: results, cancel, crashes, orphans, leaks. Needs neither Qt nor Slicer."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

pytestmark = pytest.mark.alone

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY / "LCTfound") not in sys.path:
    sys.path.insert(0, str(REPOSITORY / "LCTfound"))

from LCTfoundSlicer.jobs import (  # noqa: E402
    Callbacks,
    Job,
    JobError,
    JobErrorKind,
    JobRunner,
    JobState,
    ProgressReport,
)

if TYPE_CHECKING:
    from training.phantom.render import Rendered

PLAIN = [sys.executable, "-m", "LCTfoundLib", "worker"]
#: The real worker with tasks that misbehave on purpose, and without torch, which takes seconds to load.
LIGHT = [sys.executable, str(REPOSITORY / "Testing" / "extra_worker.py"), "light"]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


@dataclass
class Told:
    """What a job told, in order, and by which thread."""

    progress: list[ProgressReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    errors: list[JobError] = field(default_factory=list)
    cancelled: int = 0
    log: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def callbacks(self) -> Callbacks:
        def noting(add: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                self.threads.add(threading.get_ident())
                add(*arguments)

            return call

        def cancelled() -> None:
            self.cancelled += 1

        return Callbacks(
            noting(self.progress.append),
            noting(self.warnings.append),
            noting(self.results.append),
            noting(self.errors.append),
            noting(cancelled),
            noting(self.log.append),
        )

    @property
    def ends(self) -> int:
        return len(self.results) + len(self.errors) + self.cancelled


@pytest.fixture
def runners(tmp_path: Path) -> Iterator[Callable[..., JobRunner]]:
    """Makes runners that are shut down after the test."""
    made: list[JobRunner] = []

    def make(command: list[str] | None = LIGHT, **options: Any) -> JobRunner:
        made.append(JobRunner(command, scratchParent=tmp_path, **options))
        return made[-1]

    yield make
    for runner in made:
        runner.shutdown()


@pytest.fixture
def runner(runners: Callable[..., JobRunner]) -> JobRunner:
    """A runner whose worker has more tasks and said hello."""
    runner = runners()
    runner.warmUp()
    assert until(runner, lambda: runner.workerPid is not None)
    return runner


def until(runner: JobRunner, condition: Callable[[], bool], timeout: float = 60.0) -> bool:
    """Poll as a window's timer does until something holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        runner.poll()
        time.sleep(0.01)
    return True


def gone(pid: int, timeout: float = 2.0) -> bool:
    """Whether a process ends (or is only waited for) within a time."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def atWork(runner: JobRunner, task: str, told: Told, **fields: Any) -> Job:
    """A job that has begun."""
    job = runner.submit(task, fields, told.callbacks)
    assert until(runner, lambda: any(report.fraction == 0.5 for report in told.progress))
    return job


def leftovers(folder: Path) -> list[str]:
    """What a job left in a scratch folder, besides logs and the session's mark."""
    return [p.name for p in folder.iterdir() if not p.name.startswith("worker-") and p.name != "owner.json"]


class TestJobs:
    def test_a_job_gives_its_result(self, runner: JobRunner) -> None:
        told = Told()
        job = runner.submit("ping", {}, told.callbacks)
        assert job.state in (JobState.WAITING, JobState.RUNNING) and runner.isBusy
        assert runner.wait(job, 60) is JobState.DONE
        assert job.result is not None and told.results == [job.result] and told.ends == 1
        assert job.result["pong"] and not runner.isBusy

    def test_callbacks_come_only_from_poll(self, runner: JobRunner) -> None:
        told = Told()
        until(runner, lambda: runner.isWarm)
        job = runner.submit("ping", {}, told.callbacks)
        time.sleep(0.5)  # the worker finishes meanwhile
        assert not told.progress and not told.ends
        runner.wait(job, 60)
        assert told.progress and told.ends == 1 and told.threads == {threading.get_ident()}

    def test_progress_of_a_cold_start_says_so_at_once(self, runners: Callable[..., JobRunner]) -> None:
        told, runner = Told(), runners()
        runner.submit("ping", {}, told.callbacks)
        runner.poll()
        assert told.progress[0] == ProgressReport("Starting the engine", 0.0)

    def test_poll_never_waits(self, runners: Callable[..., JobRunner]) -> None:
        runner = runners(PLAIN)  # takes seconds to get ready
        slowest, busiest, end = 0.0, 0.0, time.monotonic() + 60.0
        runner.submit("doctor", {})
        while runner.isBusy and time.monotonic() < end:
            start, worked = time.monotonic(), time.thread_time()
            runner.poll()
            slowest = max(slowest, time.monotonic() - start)
            busiest = max(busiest, time.thread_time() - worked)
            time.sleep(0.005)
        assert not runner.isBusy and busiest < 0.05 and slowest < 0.5

    def test_two_jobs_at_once_are_done_one_after_the_other(self, runner: JobRunner) -> None:
        first, second = Told(), Told()
        one = atWork(runner, "obedient", first)
        two = runner.submit("ping", {}, second.callbacks)
        for _ in range(20):
            runner.poll()
        assert (one.state, two.state) == (JobState.RUNNING, JobState.WAITING) and not second.ends
        runner.cancel(one)
        assert runner.wait(two, 60) is JobState.DONE
        assert one.state is JobState.CANCELLED and (first.cancelled, first.ends, second.ends) == (1, 1, 1)

    def test_a_callback_may_submit_the_next_job_and_wait_for_it(self, runner: JobRunner) -> None:
        states: list[JobState] = []

        def next_(result: dict[str, Any]) -> None:
            states.append(runner.wait(runner.submit("ping", {}), 60))

        job = runner.submit("ping", {}, Callbacks(onResult=next_))
        runner.wait(job, 60)
        until(runner, lambda: bool(states))
        assert states == [JobState.DONE]

    def test_a_callback_that_fails_does_not_stop_the_others(
        self, runner: JobRunner, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(result: dict[str, Any]) -> None:
            raise RuntimeError("bug of a panel")

        told = Told()
        one = runner.submit("ping", {}, Callbacks(onResult=fail))
        two = runner.submit("ping", {}, told.callbacks)
        assert runner.wait(one, 60) is runner.wait(two, 60) is JobState.DONE
        assert told.ends == 1 and "bug of a panel" in caplog.text

    def test_a_payload_that_cannot_be_sent_is_told_at_once(self, runner: JobRunner) -> None:
        with pytest.raises(TypeError):
            runner.submit("ping", {"folder": object()})
        assert not runner.isBusy

    def test_paths_are_sent_as_text(self, runner: JobRunner, tmp_path: Path) -> None:
        assert runner.wait(runner.submit("ping", {"folder": tmp_path}), 60) is JobState.DONE

    def test_errors_of_the_worker_reach_the_caller(self, runner: JobRunner) -> None:
        for task, fields, kind in (
            ("hungry", {"of": "python"}, JobErrorKind.OUT_OF_MEMORY),
            ("broken", {}, JobErrorKind.INTERNAL),
        ):
            told = Told()
            job = runner.submit(task, fields, told.callbacks)
            assert runner.wait(job, 60) is JobState.FAILED
            assert told.errors == [job.error] and told.ends == 1
            assert job.error is not None and job.error.kind is kind and len(job.error.message) > 20
            if job.error.log:
                Path(job.error.log).unlink()

    def test_what_libraries_print_goes_to_the_log(self, runner: JobRunner) -> None:
        told = Told()
        job = runner.submit("noisy", {}, told.callbacks)
        assert runner.wait(job, 60) is JobState.DONE
        assert {"python noise", "descriptor noise", "child noise"} <= set(told.log)

    def test_wait_gives_up_after_its_time(self, runner: JobRunner) -> None:
        job = runner.submit("obedient", {})
        start = time.monotonic()
        assert not runner.wait(job, 0.3).isOver and time.monotonic() - start < 1.0


class TestDefaults:
    def test_finds_the_engine_and_a_python_by_itself(self, runners: Callable[..., JobRunner]) -> None:
        runner = runners(None)
        job = runner.submit("doctor", {})
        assert runner.wait(job, 60) is JobState.DONE
        assert job.result is not None and any(check["what"] == "torch" for check in job.result["checks"])

    def test_takes_slicers_python_where_there_is_one(
        self, runners: Callable[..., JobRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        launcher = tmp_path / "PythonSlicer"
        launcher.write_text(f'#!/bin/sh\ntouch "{tmp_path}/used"\n"{sys.executable}" "$@"\n')
        launcher.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        runner = runners(None)
        told = Told()
        assert runner.wait(runner.submit("doctor", {}, told.callbacks), 60) is JobState.DONE
        assert (tmp_path / "used").exists()

    def test_variables_are_added_for_the_worker(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        (tmp_path / "weights").mkdir()
        runner = runners(environment={"LCTFOUND_WEIGHTS": str(tmp_path / "weights")})
        runner.warmUp()
        assert until(runner, lambda: runner.workerPid is not None)
        variables = psutil.Process(runner.workerPid).environ()
        assert variables["LCTFOUND_WEIGHTS"] == str(tmp_path / "weights")
        assert variables["LCTFOUND_SCRATCH"] == str(runner.scratch) and "PATH" in variables

    def test_an_output_elsewhere_is_refused_by_the_worker(
        self, runners: Callable[..., JobRunner], tmp_path: Path
    ) -> None:
        runner = runners(None)
        job = runner.submit("segment_lungs", {"output": tmp_path / "elsewhere"})
        assert runner.wait(job, 60) is JobState.FAILED
        assert job.error is not None and job.error.kind is JobErrorKind.REQUEST
        assert "outside of the session's folder" in job.error.message


class TestCancel:
    def test_a_job_that_listens(self, runner: JobRunner) -> None:
        told = Told()
        job = atWork(runner, "obedient", told)
        worker = runner.workerPid
        start = time.monotonic()
        runner.cancel(job)
        assert runner.wait(job, 5) is JobState.CANCELLED and time.monotonic() - start < 0.5
        assert told.cancelled == told.ends == 1 and runner.workerPid == worker
        assert not leftovers(runner.scratch)

    @pytest.mark.parametrize("task", ["stubborn", pytest.param("frozen", marks=POSIX)])
    def test_a_job_that_does_not_is_killed_within_a_second(self, task: str, runner: JobRunner) -> None:
        told = Told()
        job = atWork(runner, task, told)
        worker = runner.workerPid
        assert worker is not None and leftovers(runner.scratch)
        start = time.monotonic()
        runner.cancel(job)
        assert runner.wait(job, 5) is JobState.CANCELLED
        took = time.monotonic() - start
        assert took < 1.0 and told.cancelled == told.ends == 1
        assert gone(worker) and not leftovers(runner.scratch)
        assert until(runner, lambda: runner.isWarm)  # a fresh one, without being asked
        assert runner.workerPid != worker
        assert runner.wait(runner.submit("ping", {}), 60) is JobState.DONE

    @POSIX
    def test_the_launcher_and_all_below_it_are_killed(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        launcher = tmp_path / "launcher"
        launcher.write_text(f"#!/bin/sh\n{shlex.join(LIGHT)}\nexit $?\n")
        launcher.chmod(0o755)
        runner, told = runners([str(launcher)]), Told()
        job = atWork(runner, "stubborn", told)
        worker = runner.workerPid
        assert worker is not None
        parent = psutil.Process(worker).ppid()
        assert parent != os.getpid()
        runner.cancel(job)
        assert runner.wait(job, 5) is JobState.CANCELLED
        assert gone(worker) and gone(parent)

    def test_a_job_that_waits(self, runner: JobRunner) -> None:
        told = Told()
        running = atWork(runner, "obedient", Told())
        job = runner.submit("ping", {}, told.callbacks)
        runner.cancel(job)
        assert runner.wait(job, 1) is JobState.CANCELLED and told.cancelled == told.ends == 1
        assert running.state is JobState.RUNNING

    def test_a_job_before_the_worker_is_there(self, runners: Callable[..., JobRunner]) -> None:
        told, runner = Told(), runners()
        job = runner.submit("ping", {}, told.callbacks)
        runner.cancel(job)
        assert runner.wait(job, 1) is JobState.CANCELLED and told.cancelled == 1

    def test_twice_or_too_late_changes_nothing(self, runner: JobRunner) -> None:
        told = Told()
        job = atWork(runner, "obedient", told)
        runner.cancel(job)
        runner.cancel(job)
        runner.wait(job, 5)
        runner.cancel(job)
        done = runner.submit("ping", {}, told.callbacks)
        runner.wait(done, 60)
        runner.cancel(done)
        for _ in range(5):
            runner.poll()
        assert (told.cancelled, len(told.results), done.state) == (1, 1, JobState.DONE)

    def test_a_result_that_comes_after_the_cancel_is_dropped(self, runner: JobRunner) -> None:
        until(runner, lambda: runner.isWarm)
        told = Told()
        job = runner.submit("ping", {}, told.callbacks)
        until(runner, lambda: job.state is JobState.RUNNING)
        time.sleep(0.5)  # it is finished, but nobody has looked yet
        runner.cancel(job)
        assert runner.wait(job, 5) is JobState.CANCELLED and not told.results and told.cancelled == 1


class TestCrash:
    @POSIX
    @pytest.mark.parametrize(
        ("number", "kind", "says"),
        [
            (signal.SIGKILL, JobErrorKind.OUT_OF_MEMORY, "memory did not suffice; close other programs"),
            (signal.SIGSEGV, JobErrorKind.CRASHED, "crashed (SIGSEGV)"),
            (signal.SIGABRT, JobErrorKind.CRASHED, "crashed (SIGABRT)"),
        ],
    )
    def test_a_worker_that_dies_costs_its_job_only(
        self, number: int, kind: JobErrorKind, says: str, runner: JobRunner
    ) -> None:
        told, waiting = Told(), Told()
        job = runner.submit("dying", {"signal": int(number)}, told.callbacks)
        after = runner.submit("ping", {}, waiting.callbacks)
        assert runner.wait(job, 60) is JobState.FAILED
        assert job.error is not None and told.errors == [job.error] and told.ends == 1
        assert job.error.kind is kind and says in job.error.message
        assert "last words" in job.error.details and "last words" in Path(job.error.log).read_text()
        assert "{log}" not in job.error.message
        Path(job.error.log).unlink()
        assert runner.wait(after, 60) is JobState.DONE and not leftovers(runner.scratch)

    @POSIX
    def test_killed_from_outside_in_the_middle(self, runner: JobRunner) -> None:
        told = Told()
        job = atWork(runner, "obedient", told)
        assert runner.workerPid is not None
        os.kill(runner.workerPid, signal.SIGKILL)
        assert runner.wait(job, 5) is JobState.FAILED
        assert told.errors[0].kind is JobErrorKind.OUT_OF_MEMORY
        Path(told.errors[0].log).unlink()
        assert runner.wait(runner.submit("ping", {}), 60) is JobState.DONE

    @POSIX
    def test_a_signal_that_a_launcher_passes_on(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        launcher = tmp_path / "launcher"
        launcher.write_text(f"#!/bin/sh\n{shlex.join(LIGHT)}\nexit $?\n")
        launcher.chmod(0o755)
        runner = runners([str(launcher)])
        job = runner.submit("dying", {"signal": int(signal.SIGKILL)})
        assert runner.wait(job, 60) is JobState.FAILED
        assert job.error is not None and job.error.kind is JobErrorKind.OUT_OF_MEMORY
        Path(job.error.log).unlink()

    @POSIX
    def test_one_that_dies_while_idle_is_replaced(self, runner: JobRunner) -> None:
        until(runner, lambda: runner.isWarm)
        first = runner.workerPid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert gone(first)
        until(runner, lambda: runner.workerPid is None)
        assert runner.wait(runner.submit("ping", {}), 60) is JobState.DONE
        assert runner.workerPid not in (None, first)

    @POSIX
    def test_a_job_sent_to_a_worker_that_has_just_died_fails_with_a_sentence(self, runner: JobRunner) -> None:
        until(runner, lambda: runner.isWarm)
        assert runner.workerPid is not None
        os.kill(runner.workerPid, signal.SIGKILL)
        gone(runner.workerPid)
        job = runner.submit("ping", {})  # nobody has polled: the runner does not know yet
        assert runner.wait(job, 60) is JobState.FAILED
        assert job.error is not None and job.error.message
        Path(job.error.log).unlink()
        assert runner.wait(runner.submit("ping", {}), 60) is JobState.DONE


class TestStart:
    def failed(self, runner: JobRunner) -> JobError:
        told = Told()
        jobs = [runner.submit("ping", {}, told.callbacks) for _ in range(2)]
        for job in jobs:
            assert runner.wait(job, 20) is JobState.FAILED
        assert len(told.errors) == told.ends == 2
        error = told.errors[0]
        assert error.kind is JobErrorKind.NOT_STARTED and "check the set-up" in error.message
        return error

    def test_a_program_that_is_not_there(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        assert "No such file" in self.failed(runners([str(tmp_path / "no-python")])).message

    def test_an_engine_that_cannot_be_imported(self, runners: Callable[..., JobRunner]) -> None:
        error = self.failed(runners([sys.executable, "-m", "LCTfoundLib_that_is_not_there", "worker"]))
        assert "exit code 1" in error.message and "No module named" in error.message
        assert "No module named" in error.details and "No module named" in Path(error.log).read_text()
        Path(error.log).unlink()

    def test_a_program_that_never_says_hello(self, runners: Callable[..., JobRunner]) -> None:
        script = "import sys, time; print('still loading', file=sys.stderr, flush=True); time.sleep(600)"
        runner = runners([sys.executable, "-c", script], helloTimeout=1.0)
        children = len(psutil.Process().children())
        error = self.failed(runner)
        assert "no answer in 1 s: still loading" in error.message
        Path(error.log).unlink()
        assert until(runner, lambda: len(psutil.Process().children()) <= children, 5.0)

    def test_a_program_that_says_something_else(self, runners: Callable[..., JobRunner]) -> None:
        script = "import time; print('Python 3.12 at your service', flush=True); time.sleep(600)"
        error = self.failed(runners([sys.executable, "-c", script], helloTimeout=1.0))
        assert "Python 3.12 at your service" in error.message
        Path(error.log).unlink()

    def test_an_engine_of_another_protocol(self, runners: Callable[..., JobRunner]) -> None:
        hello = json.dumps({"event": "hello", "protocol": 99, "version": "9.9", "pid": 1})
        script = f"import time; print('''{hello}''', flush=True); time.sleep(600)"
        assert "engine 9.9 does not fit" in self.failed(runners([sys.executable, "-c", script])).message

    def test_one_that_closes_its_output_and_goes_on(self, runners: Callable[..., JobRunner]) -> None:
        script = "import os, time; os.close(1); time.sleep(600)"
        error = self.failed(runners([sys.executable, "-c", script]))
        Path(error.log).unlink()

    def test_a_runner_whose_worker_failed_can_be_tried_again(
        self, runners: Callable[..., JobRunner], tmp_path: Path
    ) -> None:
        program = tmp_path / "program"
        runner = runners([str(program)])
        self.failed(runner)
        program.write_text(f"#!/bin/sh\nexec {shlex.join(LIGHT)}\n")
        program.chmod(0o755)
        assert runner.wait(runner.submit("ping", {}), 60) is JobState.DONE


class TestShutdown:
    @pytest.mark.parametrize("task", ["", "obedient", "stubborn", pytest.param("frozen", marks=POSIX)])
    def test_leaves_no_process_and_no_folder(self, task: str, runner: JobRunner) -> None:
        told, worker, scratch = Told(), runner.workerPid, runner.scratch
        job = atWork(runner, task, told) if task else None
        assert worker is not None and scratch.is_dir()
        before = told.ends
        start = time.monotonic()
        runner.shutdown()
        assert time.monotonic() - start < 2.5
        assert gone(worker, 0.5) and not scratch.exists()
        assert told.ends == before and (job is None or job.state is JobState.CANCELLED)
        runner.shutdown()  # again is no harm
        runner.poll()
        with pytest.raises(RuntimeError, match="shut down"):
            runner.submit("ping", {})

    def test_an_export_in_the_users_folder_leaves_nothing_unfinished(self, runner: JobRunner, tmp_path: Path) -> None:
        target = tmp_path / "user"
        target.mkdir()
        (target / "own.txt").write_text("stays")
        told = Told()
        job = atWork(runner, "stubborn", told, folder=str(target))
        (target / ".lctfound-unfinished-12345-update").mkdir()  # as the export makes it
        (tmp_path / ".lctfound-unfinished-12345-user").mkdir()
        (target / ".hidden-user").mkdir()
        runner.cancel(job)
        runner.wait(job, 5)
        assert sorted(path.name for path in target.iterdir()) == [".hidden-user", "own.txt"]
        assert not (tmp_path / ".lctfound-unfinished-12345-user").exists()

    @pytest.mark.parametrize("ending", ["pass", "import sys; sys.exit(3)", "raise RuntimeError('bug')"])
    def test_a_program_that_forgets_it_leaves_nothing_either(self, ending: str, tmp_path: Path) -> None:
        process, worker, scratch = child(tmp_path, ending)
        process.communicate(b"\n", timeout=30)
        assert gone(worker) and not scratch.exists()

    @POSIX
    @pytest.mark.parametrize("task", ["stubborn", "obedient"])
    def test_a_program_that_is_killed_takes_its_worker_along(self, task: str, tmp_path: Path) -> None:
        process, worker, scratch = child(tmp_path, "pass", task)
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        assert gone(worker, 2.0)
        print(f"orphan gone after {time.monotonic() - start:.2f} s")
        assert scratch.is_dir()  # nobody could remove it ...
        runner = JobRunner(LIGHT, scratchParent=tmp_path)
        assert until(runner, lambda: not scratch.exists(), 5.0)  # ... but the next session does
        runner.shutdown()


def child(tmp_path: Path, ending: str, task: str = "obedient") -> tuple[subprocess.Popen[bytes], int, Path]:
    """Another program with a runner at work; it ends as told when its input has a line."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path[:0] = [{str(REPOSITORY / "LCTfound")!r}, {str(REPOSITORY)!r}]
        from pathlib import Path
        from LCTfoundSlicer.jobs import Callbacks, JobRunner
        runner = JobRunner({LIGHT!r}, scratchParent=Path({str(tmp_path)!r}))
        seen = []
        runner.submit({task!r}, {{}}, Callbacks(onProgress=seen.append))
        while not any(report.fraction == 0.5 for report in seen):
            runner.poll()
            time.sleep(0.01)
        print(runner.workerPid, runner.scratch, flush=True)
        sys.stdin.readline()
        {ending}
        """
    )
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout is not None
    pid, _, scratch = process.stdout.readline().decode().strip().partition(" ")
    return process, int(pid), Path(scratch)


class TestSweeping:
    def abandoned(self, parent: Path, pid: int, host: str | None = None) -> Path:
        folder = parent / f"lctfound-session-{pid}-abcdef"
        (folder / "job").mkdir(parents=True)
        (folder / "job" / "big.npy").write_bytes(b"0" * 100_000)
        (folder / "owner.json").write_text(json.dumps({"pid": pid, "host": host or socket.gethostname()}))
        return folder

    def deadPid(self) -> int:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            process.wait()
            return process.pid

    def test_folders_of_dead_sessions_go_at_the_next_start(
        self, runners: Callable[..., JobRunner], tmp_path: Path
    ) -> None:
        dead = self.abandoned(tmp_path, self.deadPid())
        ours = self.abandoned(tmp_path, os.getpid())  # an earlier process with the number that this one has now
        runner = runners()
        assert until(runner, lambda: not dead.exists() and not ours.exists(), 5.0)
        assert runner.scratch.is_dir()

    def test_what_belongs_to_others_stays(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        alive = self.abandoned(tmp_path, os.getppid())
        elsewhere = self.abandoned(tmp_path, self.deadPid() + 100_000, "another-computer")
        other = runners()
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").write_text("content")
        link = tmp_path / "lctfound-session-1-link"
        link.symlink_to(precious, target_is_directory=True)
        unmarked = tmp_path / "lctfound-session-2-new"
        unmarked.mkdir()
        one = runners()
        one._scratch._sweeper.join(5)
        for folder in (alive, elsewhere, other.scratch, precious / "file", link, unmarked, one.scratch):
            assert folder.exists(), folder

    def test_an_old_folder_without_a_mark_goes(self, runners: Callable[..., JobRunner], tmp_path: Path) -> None:
        unmarked = tmp_path / "lctfound-session-2-old"
        unmarked.mkdir()
        yesterday = time.time() - 3 * 86_400
        os.utime(unmarked, (yesterday, yesterday))
        runner = runners()
        assert until(runner, lambda: not unmarked.exists(), 5.0)


class TestLeaks:
    @pytest.mark.slow
    def test_a_hundred_jobs_leak_nothing(self, runners: Callable[..., JobRunner]) -> None:
        runner = runners(PLAIN)
        runner.warmUp()
        assert until(runner, lambda: runner.isWarm)
        me, worker = psutil.Process(), psutil.Process(runner.workerPid)

        def do(count: int) -> None:
            for _ in range(count):
                assert runner.wait(runner.submit("doctor", {}, Told().callbacks), 60) is JobState.DONE

        def counts() -> tuple[int, ...]:
            gc.collect()
            return (handles(me), handles(worker), me.num_threads(), worker.num_threads(), len(me.children(True)))

        do(20)
        before, memory = counts(), (me.memory_info().rss, worker.memory_info().rss)
        do(100)
        assert counts() == before
        grown = (me.memory_info().rss - memory[0], worker.memory_info().rss - memory[1])
        assert max(grown) < 8_000_000, grown
        assert not leftovers(runner.scratch)

    def test_workers_that_were_killed_leave_no_handles_threads_or_processes(self, runner: JobRunner) -> None:
        me = psutil.Process()

        def kill() -> None:
            until(runner, lambda: runner.workerPid is not None)
            job = atWork(runner, "stubborn", Told())
            runner.cancel(job)
            assert runner.wait(job, 5) is JobState.CANCELLED

        kill()
        until(runner, lambda: runner.isWarm and len(me.children()) == 1)
        before = (handles(me), me.num_threads(), len(me.children(True)))
        for _ in range(3):
            kill()
        assert until(
            runner,
            lambda: runner.isWarm and (handles(me), me.num_threads(), len(me.children(True))) == before,
        )


def handles(process: psutil.Process) -> int:
    return process.num_fds() if hasattr(process, "num_fds") else process.num_handles()


@pytest.mark.end_to_end
@pytest.mark.usefixtures("shipped_weights")
class TestRealSegmentation:
    """The shipped networks on a small phantom."""

    @pytest.fixture
    def real(self, runners: Callable[..., JobRunner]) -> JobRunner:
        runner = runners(PLAIN)
        runner.warmUp()
        assert until(runner, lambda: runner.isWarm)
        return runner

    def payload(self, runner: JobRunner, case: Rendered) -> dict[str, Any]:
        np.save(runner.scratch / "ct.npy", case.ct.array)
        image = {
            "array": runner.scratch / "ct.npy",
            "spacing": case.ct.spacing,
            "origin": case.ct.origin,
            "direction": case.ct.direction.ravel().tolist(),
        }
        return {"input": image, "options": {"quality": "fast", "device": "cpu"}}

    def test_progress_comes_within_a_second_and_the_result_in_the_scratch_folder(
        self, real: JobRunner, phantom_case: Rendered
    ) -> None:
        told, payload = Told(), self.payload(real, phantom_case)
        start = time.monotonic()
        job = real.submit("segment_lungs", payload, told.callbacks)
        assert until(real, lambda: bool(told.progress), 1.0)
        print(f"Apply to first progress: {time.monotonic() - start:.3f} s")
        assert real.wait(job, 280) is JobState.DONE
        assert job.result is not None
        folder = Path(job.result["folder"])
        assert folder.parent == real.scratch and (folder / "result.json").is_file()
        assert [r.fraction for r in told.progress] == sorted(r.fraction for r in told.progress)
        assert any(r.secondsLeft is not None for r in told.progress)

    @pytest.mark.parametrize("stage", ["Fine network", "Airway and vessels"])
    def test_cancel_takes_less_than_a_second_wherever_it_is(
        self, stage: str, real: JobRunner, phantom_case: Rendered
    ) -> None:
        told = Told()
        job = real.submit("segment_lungs", self.payload(real, phantom_case), told.callbacks)
        assert until(real, lambda: any(report.stage == stage for report in told.progress), 120.0)
        start = time.monotonic()
        real.cancel(job)
        assert until(real, lambda: job.state.isOver, 5.0)
        took = time.monotonic() - start
        print(f"cancel in '{stage}': {took:.2f} s")
        assert job.state is JobState.CANCELLED and took < 1.0
        assert leftovers(real.scratch) == ["ct.npy"]

    @POSIX
    def test_a_worker_killed_in_the_middle_of_a_tile_is_replaced(self, real: JobRunner, phantom_case: Rendered) -> None:
        told = Told()
        job = real.submit("segment_lungs", self.payload(real, phantom_case), told.callbacks)
        assert until(real, lambda: any(report.stage == "Fine network" for report in told.progress), 120.0)
        assert real.workerPid is not None
        os.kill(real.workerPid, signal.SIGKILL)
        assert real.wait(job, 5) is JobState.FAILED
        assert job.error is not None and job.error.kind is JobErrorKind.OUT_OF_MEMORY
        Path(job.error.log).unlink()
        assert leftovers(real.scratch) == ["ct.npy"]
        assert real.wait(real.submit("doctor", {}), 60) is JobState.DONE

    def test_the_end_of_the_program_ends_it_in_the_middle_of_a_tile(
        self, runners: Callable[..., JobRunner], phantom_case: Rendered, tmp_path: Path
    ) -> None:
        np.save(tmp_path / "ct.npy", phantom_case.ct.array)
        script = textwrap.dedent(
            f"""
            import sys, time
            sys.path[:0] = [{str(REPOSITORY / "LCTfound")!r}, {str(REPOSITORY)!r}]
            from pathlib import Path
            from LCTfoundSlicer.jobs import Callbacks, JobRunner
            runner = JobRunner({PLAIN!r}, scratchParent=Path({str(tmp_path)!r}))
            seen = []
            image = {{"array": {str(tmp_path / "ct.npy")!r}, "spacing": {list(phantom_case.ct.spacing)!r},
                      "origin": {[float(x) for x in phantom_case.ct.origin]!r},
                      "direction": [1, 0, 0, 0, 1, 0, 0, 0, 1]}}
            options = {{"quality": "fast", "device": "cpu"}}
            runner.submit("segment_lungs", {{"input": image, "options": options}}, Callbacks(onProgress=seen.append))
            while not any(report.stage == "Fine network" for report in seen):
                runner.poll()
                time.sleep(0.01)
            print(runner.workerPid, flush=True)
            time.sleep(600)
            """
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            worker = int(process.stdout.readline())
            process.kill()
            process.wait()
            start = time.monotonic()
            assert gone(worker, 2.0)
            print(f"orphan in a tile gone after {time.monotonic() - start:.2f} s")
