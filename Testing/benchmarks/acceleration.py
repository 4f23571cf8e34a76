"""How fast is the foundation model here, in which way of running it, and how far is that from what the hardware allows?

    ./run python Testing/benchmarks/acceleration.py --out output/acceleration
        [--presets student,lite,paper] [--batches 1,4,8] [--modes eager,channels-last,...] [--device cpu|cuda]
        [--threads N] [--minutes 10] [--size 256] [--allow-busy]

Writes results.json (after each step), report.md and roofline.png. Weights are random, fixed by a seed: the time of a
pass does not depend on them. Each preset runs in each mode in a process of its own, so that its peak memory is its own
and a mode that runs out of memory or time, or has no compiler, is a line of the report and not its end. Batches run
small first: the process's peak is that of the largest so far. Compiled code is made anew, in a folder of this run.

Needs torch, numpy and the engine's other dependencies in pyproject.toml, of which a GPU server's image often lacks only
diffusers (a pure Python package): `pip install diffusers -c constraints.txt`. Run here with torch 2.13; nothing in it
is newer than 2.6. The modes for GPUs were written where there is none, and have not been run yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from LCTfoundLib.networks.backbone import CHANNELS, EMBEDDING_SIZE, Preset, build_backbone, parameter_count  # noqa: E402
from LCTfoundLib.networks.features import PUBLISHED_TIMESTEPS, FeatureExtractor, SinglePassExtractor  # noqa: E402
from LCTfoundLib.runtime.device import choose_device, cpu_count  # noqa: E402
from Testing.benchmarks.acceleration_report import write_report  # noqa: E402
from Testing.benchmarks.roofline import Kind, Operation, Peaks, limit, measure_peaks, torch_flops, trace  # noqa: E402

#: Share of the cores that others may use before a number is marked.
BUSY = 0.1
#: Passes that are timed at least, and at most; a pass of many seconds is timed once after its warm-up.
REPEATS = (2, 7)
LONG_PASS = 8.0
#: Seconds that a task gets at least, once it was started.
PATIENCE = 20.0
_SEED = 20


@dataclass(frozen=True)
class Mode:
    """A way to run a network.

    Attributes:
        says: what it is, for the report.
        precision: of weights and arithmetic.
        channels_last: memory layout.
        autocast: float32 weights, converted in each pass.
        compiled: torch.compile's own mode; None to not compile.
        graphs: the pass is recorded once and replayed (CUDA graphs).
        gpu_only: cannot run on a CPU.
    """

    says: str
    precision: str = "fp32"
    channels_last: bool = True
    autocast: bool = False
    compiled: str | None = None
    graphs: bool = False
    gpu_only: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


MODES: dict[str, Mode] = {
    "eager": Mode("as diffusers builds it: fp32", channels_last=False),
    "channels-last": Mode("fp32, channels last"),
    "bf16-eager": Mode("bf16, nothing else", "bf16", channels_last=False, gpu_only=True),
    "bf16": Mode("bf16, channels last", "bf16"),
    "autocast": Mode("bf16 by autocast over fp32 weights, channels last", "bf16", autocast=True),
    "graphs": Mode("bf16, channels last, CUDA graph", "bf16", graphs=True, gpu_only=True),
    "compiled": Mode("fp32, channels last, torch.compile", compiled="default"),
    "compiled-bf16": Mode("bf16, channels last, torch.compile", "bf16", compiled="default"),
    "compiled-graphs": Mode(
        "bf16, channels last, torch.compile with CUDA graphs", "bf16", compiled="reduce-overhead", gpu_only=True
    ),
}

#: On a CPU without --modes: the large presets take many seconds a slice and minutes to compile.
_CPU_MODES: dict[str, tuple[str, ...]] = {
    "student": ("eager", "channels-last", "bf16", "autocast", "compiled", "compiled-bf16"),
    "lite": ("eager", "channels-last", "bf16", "compiled"),
    "paper": ("eager", "channels-last", "bf16"),
}
#: A task's share of the time: by its preset and, for compilation, by what that takes beside the passes.
_WEIGHT = {"student": 1.0, "lite": 1.2, "paper": 3.0}
_COMPILING = 4.0


@dataclass(frozen=True)
class Task:
    """What one process measures.

    Attributes:
        kind: ``peaks``, ``network`` or ``features``.
        device: ``cpu`` or ``cuda``.
        threads: of the CPU.
        preset, mode, batches, size: of a network; features use ``batches`` as numbers of slices.
        seconds: to start no further repeat or batch after; what was begun is finished.
        reference: file with the eager answer of the first batch, written by the eager mode.
    """

    kind: str
    device: str
    threads: int
    preset: str = ""
    mode: str = ""
    batches: tuple[int, ...] = (1,)
    size: int = 256
    seconds: float = 60.0
    reference: str = ""


# --- in a process of its own --------------------------------------------------------------------------------------


def run_here(task: Task, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure; each number is written as soon as it is there."""
    torch.set_num_threads(task.threads)
    torch.manual_seed(_SEED)
    with Others() as others:
        match task.kind:
            case "peaks":
                peaks = measure_peaks(torch.device(task.device), task.seconds)
                write({"peaks": peaks.as_dict(), "others": others.share()})
            case "features":
                measure_features(task, write)
            case "network":
                measure_network(task, write)


def measure_network(task: Task, write: Callable[[dict[str, Any]], None]) -> None:
    """Seconds and memory of a preset in a mode, batch after batch."""
    deadline = time.perf_counter() + task.seconds
    base = peak_memory(task.device)
    network, mode = prepared(task), MODES[task.mode]
    per_slice = compiling = 0.0
    batches = sorted(task.batches)
    for number, batch in enumerate(batches):
        expected = per_slice * batch * (1 + REPEATS[0]) + compiling
        if per_slice and time.perf_counter() + expected > deadline:
            write({"batch": batch, "state": "no time", "note": f"about {expected:.0f} s, more than its share"})
            continue
        try:
            with Others() as others:
                now = time.perf_counter()
                mine = now + (deadline - now) * batch / sum(batches[number:])
                times, first, answer = timed_passes(network, mode, inputs(task, batch), mine)
                share = others.share()
        except Exception as error:  # whatever stops a mode is its result
            write({"batch": batch, "state": state_of(error), "note": _one_line(error)})
            return
        per_slice = statistics.median(times) / batch
        compiling = max(0.0, first - statistics.median(times)) if mode.compiled else 0.0
        write(
            {
                "batch": batch,
                "state": "measured",
                "seconds": per_slice,
                "spread": (max(times) - min(times)) / statistics.median(times),
                "repeats": len(times),
                "first": first,
                "memory": peak_memory(task.device),
                "base_memory": base,
                "others": share,
                "difference": difference(task, batch, answer),
            }
        )


def prepared(task: Task) -> torch.nn.Module:
    """The network of a task as its mode wants it, before compilation."""
    mode = MODES[task.mode]
    network = build_backbone(task.preset).eval().requires_grad_(False)
    network.to(device=task.device, dtype=torch.float32 if mode.autocast else mode.dtype)
    return network.to(memory_format=torch.channels_last) if mode.channels_last else network


def inputs(task: Task, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slices, timesteps and conditions; the same at each call, and the first slice the same for each batch."""
    mode = MODES[task.mode]
    dtype = torch.float32 if mode.autocast else mode.dtype
    images, told = [], []
    for number in range(batch):
        generator = torch.Generator().manual_seed(_SEED + number)
        images.append(torch.rand(CHANNELS, task.size, task.size, generator=generator) * 2 - 1)
        told.append(torch.randn(1, EMBEDDING_SIZE, generator=generator))
    stacked = torch.stack(images).to(task.device, dtype)
    if mode.channels_last:
        stacked = stacked.contiguous(memory_format=torch.channels_last)
    timesteps = torch.full((batch,), PUBLISHED_TIMESTEPS[1], device=task.device)
    return stacked, timesteps, torch.stack(told).to(task.device, dtype)


def timed_passes(
    network: torch.nn.Module, mode: Mode, given: Sequence[torch.Tensor], deadline: float
) -> tuple[list[float], float, torch.Tensor]:
    """Seconds of passes after warm-up, of the first pass (compilation included), and the answer."""
    device = given[0].device
    # Not inference_mode: torch.compile and CUDA graphs treat its tensors apart.
    with torch.no_grad(), torch.autocast(device.type, mode.dtype, enabled=mode.autocast):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        one_pass = ready(network, mode, given)
        answer = one_pass().float().cpu()  # a copy: a recorded pass writes its next answer to the same place
        first = time.perf_counter() - start
        if mode.compiled or device.type == "cuda":  # the first pass was no usual one: compiled, tuned
            for _ in range(2):
                one_pass()
            _wait(device)
        times: list[float] = []
        while len(times) < REPEATS[1]:
            start = time.perf_counter()
            one_pass()
            _wait(device)
            times.append(time.perf_counter() - start)
            enough = len(times) >= (REPEATS[0] if times[0] < LONG_PASS else 1)
            if enough and time.perf_counter() + times[-1] > deadline:
                break
    return times, first, answer


def ready(network: torch.nn.Module, mode: Mode, given: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """One pass over the given inputs, as a call."""
    if mode.compiled:
        torch._dynamo.reset()  # each batch for itself, with fixed shapes
        network = torch.compile(network, mode=mode.compiled, dynamic=False)
    if not mode.graphs:
        return lambda: network(*given, return_dict=False)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # recording needs libraries that have chosen their kernels
        for _ in range(3):
            network(*given, return_dict=False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = network(*given, return_dict=False)[0]

    def replay() -> torch.Tensor:
        graph.replay()
        return answer

    return replay


def measure_features(task: Task, write: Callable[[dict[str, Any]], None]) -> None:
    """Features of four noisy timesteps (all in one batch, and one by one) against those of one clean pass, in turns."""
    deadline = time.perf_counter() + task.seconds
    device = torch.device(task.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = build_backbone(task.preset).eval().requires_grad_(False).to(device)
    per_slice = 0.0
    batches = sorted(task.batches)
    for number, count in enumerate(batches):
        together = FeatureExtractor(network, batch=count * len(PUBLISHED_TIMESTEPS), dtype=dtype)
        apart = FeatureExtractor(network, batch=count, dtype=dtype)
        single = SinglePassExtractor(network).eval().to(memory_format=torch.channels_last)
        images = torch.rand(count, CHANNELS, task.size, task.size, device=device) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        told = torch.randn(1, 1, EMBEDDING_SIZE, device=device)
        ways: dict[str, Callable[[], Any]] = {
            "together": lambda extract=together, images=images, told=told: extract(images, told),
            "apart": lambda extract=apart, images=images, told=told: extract(images, told),
            "clean": lambda single=single, images=images, told=told: single.clean(images, told),
            "all": lambda single=single, images=images, told=told: single(images, told),
        }
        if per_slice and time.perf_counter() + 3 * per_slice * count > deadline:
            write({"batch": count, "state": "no time", "note": "more than its share of the time"})
            continue
        try:
            with Others() as others, torch.no_grad():
                now = time.perf_counter()
                mine = now + (deadline - now) * count / sum(batches[number:])
                times = in_turns(ways, device, dtype, mine)
                share = others.share()
        except Exception as error:  # as for a network
            write({"batch": count, "state": state_of(error), "note": _one_line(error)})
            return
        medians = {name: statistics.median(values) / count for name, values in times.items()}
        per_slice = sum(medians.values())
        write({"batch": count, "state": "measured", **medians, "repeats": len(times["all"]), "others": share})


def in_turns(
    ways: dict[str, Callable[[], Any]], device: torch.device, dtype: torch.dtype, deadline: float
) -> dict[str, list[float]]:
    """Seconds of each way, one after the other and again, so that a slow minute hits all; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    turns = 0
    while turns <= REPEATS[1]:
        begun = time.perf_counter()
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                way()
            _wait(device)
            if turns:
                times[name].append(time.perf_counter() - start)
        turns += 1
        turn = time.perf_counter() - begun
        if turns > (REPEATS[0] if turn < 3 * LONG_PASS else 1) and time.perf_counter() + turn > deadline:
            break
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(task: Task, batch: int, answer: torch.Tensor) -> float | None:
    """Of a mode's answer for the first batch from the eager one, as a share of its size; None without eager."""
    if batch != min(task.batches) or not task.reference:
        return None
    path = Path(task.reference)
    if task.mode == "eager":
        torch.save(answer, path)
    if not path.is_file():
        return None
    wanted = torch.load(path, weights_only=True)
    return float((answer - wanted).norm() / wanted.norm())


def peak_memory(device: str) -> int:
    """Bytes: of a GPU, held by torch since the last reset; else this process's largest resident size so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    with suppress(OSError):  # Linux; there getrusage starts from the size of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def state_of(error: BaseException) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc" in str(error) and "memory" in str(error):
        return "out of memory"
    return "failed"


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class Others:
    """Share of the machine's cores that other processes used meanwhile."""

    def __enter__(self) -> Others:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def share(self) -> float:
        """0..1, since the start."""
        now, then = self._now(), self._start
        seconds = (now[0] - then[0]) * (os.cpu_count() or 1)
        return max(0.0, (now[1] - then[1]) - (now[2] - then[2])) / max(seconds, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Clock; busy seconds of all cores; of them this process's and its children's."""
        all_cores = psutil.cpu_times()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guest time is within user time
        busy = sum(value for name, value in all_cores._asdict().items() if name not in idle)
        process = psutil.Process()
        own = sum(process.cpu_times()[:4])
        for child in process.children(recursive=True):
            with suppress(psutil.Error):
                own += sum(child.cpu_times()[:2])
        return time.perf_counter(), busy, own


# --- in the process that plans and reports ------------------------------------------------------------------------


def run_apart(task: Task, folder: Path, patience: float) -> tuple[list[dict[str, Any]], str, str]:
    """Measure a task in a process of its own.

    Args:
        task: to measure.
        folder: for its files.
        patience: seconds after which it is ended.

    Returns:
        What it wrote; ``measured``, ``out of memory``, ``no time`` or ``failed``; a note on that.
    """
    order, answers, errors = folder / "task.json", folder / "answers.jsonl", folder / "errors.txt"
    order.write_text(json.dumps(asdict(task)), encoding="utf-8")
    answers.write_text("", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(task.threads), "TORCHINDUCTOR_CACHE_DIR": str(folder / "code")}
    command = [sys.executable, str(Path(__file__).resolve()), "--task", str(order), "--out", str(answers)]
    with errors.open("w", encoding="utf-8") as log:
        # A session of its own: with the process its compilers can be ended too.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    records = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    if code is None:
        return records, "no time", f"ended after {patience:.0f} s"
    if code == -9:  # SIGKILL, and not from us
        return records, "out of memory", "ended by the system"
    if code:
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return records, "failed", lines[-1][:200] if lines else f"exit code {code}"
    return records, "measured", ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and what it started."""
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, made above
        else:
            process.kill()
    process.wait()


def planned(options: argparse.Namespace, folder: Path) -> list[tuple[Task, float]]:
    """Tasks with their shares of the time, the most telling first."""
    plan: list[tuple[Task, float]] = []
    for preset in options.presets:
        reference = str(folder / f"{preset}.pt")
        for name in modes_of(preset, options):
            weight = _WEIGHT[preset] * (_COMPILING if MODES[name].compiled else 1.0)
            task = Task(
                "network", options.device, options.threads, preset, name, options.batches, options.size, 0.0, reference
            )
            plan.append((task, weight))
        # On a CPU four passes of a large preset take a minute, and tell what the student's tell.
        if options.device == "cuda" or preset == "student":
            slices = tuple(sorted({min(options.batches), min(4, max(options.batches))}))
            task = Task("features", options.device, options.threads, preset, "", slices, options.size)
            plan.append((task, _WEIGHT[preset]))
    return sorted(plan, key=lambda item: bool(item[0].mode) and MODES[item[0].mode].compiled is not None)


def modes_of(preset: str, options: argparse.Namespace) -> tuple[str, ...]:
    if options.modes:
        return options.modes
    if options.device == "cpu":
        return _CPU_MODES[preset]
    return tuple(MODES)


def counted(preset: str, options: argparse.Namespace, peaks: Peaks | None) -> dict[str, Any]:
    """Parameters, operations and limits of a preset, by shapes alone."""
    network = build_backbone(preset, "meta").eval()
    plain = trace(network, 1, options.size)
    facts: dict[str, Any] = {
        "parameters": parameter_count(network),
        "flops": sum(operation.flops for operation in plain),
        "flops_by_torch": torch_flops(network, 1, options.size),
        "exponentials": sum(operation.exponentials for operation in plain),
        "parts": parts_of(plain),
        "limits": {},
    }
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        network.to(dtype)
        for batch in options.batches:
            operations = trace(network, batch, options.size)
            entry: dict[str, Any] = {
                "moved": sum(operation.moved(True) for operation in operations) / batch,
                "moved_not_fused": sum(operation.moved(False) for operation in operations) / batch,
            }
            if peaks is not None:
                bound = limit(operations, peaks, precision)
                entry |= {"seconds": bound.seconds / batch, "held_up_by": bound.held_up_by}
                entry |= {name: value / batch for name, value in asdict(bound).items()}
                entry["seconds_not_fused"] = limit(operations, peaks, precision, fused=False).seconds / batch
            facts["limits"][f"{precision} {batch}"] = entry
    return facts


def parts_of(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    """Operations added up by what they are and how large their map is, most work first."""
    parts: dict[tuple[Kind, int], dict[str, Any]] = {}
    for operation in operations:
        if operation.flops:
            new = {"kind": operation.kind.value, "positions": operation.positions}
            part = parts.setdefault(
                (operation.kind, operation.positions), {**new, "count": 0, "flops": 0, "exponentials": 0, "moved": 0}
            )
            part["count"] += 1
            part["flops"] += operation.flops
            part["exponentials"] += operation.exponentials
            part["moved"] += operation.moved(True)
    return sorted(parts.values(), key=lambda part: -part["flops"])


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": choose_device(options.device).name,
        "kind": options.device,
        "threads": options.threads,
        "memory": psutil.virtual_memory().total,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "tf32": {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All tasks, within the time; results are on disk after each."""
    results: dict[str, Any] = {
        "machine": machine(options),
        "size": options.size,
        "minutes": options.minutes,
        "load_before": options.load,
        "modes": {name: asdict(mode) | {"compiled": mode.compiled is not None} for name, mode in MODES.items()},
        "presets": {},
        "runs": [],
        "features": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peaks = apart_peaks(options, folder, results)
        for preset in options.presets:
            results["presets"][preset] = counted(preset, options, peaks)
        save(results, options.out)
        end = time.monotonic() + options.minutes * 60
        plan = planned(options, folder)
        weights = [weight for _, weight in plan]
        for number, (task, weight) in enumerate(plan):
            left = max(0.0, end - time.monotonic())
            share = left * weight / sum(weights[number:])
            add(results, task, folder, share, left)
            save(results, options.out)
    return results


def apart_peaks(options: argparse.Namespace, folder: Path, results: dict[str, Any]) -> Peaks | None:
    seconds = min(12.0, options.minutes * 60 * 0.1)
    task = Task("peaks", options.device, options.threads, seconds=seconds)
    records, state, note = run_apart(task, folder, 60 + 10 * seconds)
    tell("peaks of the machine", state, note)
    if not records:
        results["peaks"] = None
        return None
    results["peaks"] = records[0]["peaks"] | {"others": records[0]["others"]}
    return Peaks.from_dict(records[0]["peaks"])


def add(results: dict[str, Any], task: Task, folder: Path, share: float, left: float) -> None:
    """Run a task and note what came of it, for each of its batches."""
    what = f"{task.preset} {task.mode or task.kind}"
    where = results["runs" if task.kind == "network" else "features"]
    known = {"preset": task.preset} | ({"mode": task.mode} if task.mode else {})
    problem = unfit(task)
    if problem or left <= 0:
        state, note = ("failed", problem) if problem else ("no time", "none was left")
        where += [known | {"batch": batch, "state": state, "note": note} for batch in task.batches]
        return tell(what, state, note)
    begun = time.monotonic()
    # Of its share some seconds go to starting Python. What it has begun when that is over it may finish.
    ordered = Task(**{**asdict(task), "seconds": max(1.0, share - 6)})
    records, state, note = run_apart(ordered, folder, max(left, PATIENCE))
    where += [known | record for record in records]
    if state == "measured" and records and records[-1]["state"] not in ("measured", "no time"):
        state, note = records[-1]["state"], records[-1]["note"]
    done = {record["batch"] for record in records}
    missing = [batch for batch in sorted(task.batches) if batch not in done]
    where += [known | {"batch": batch, "state": state, "note": note} for batch in missing]
    numbers = [f"{record.get('seconds', record.get('clean')):.3f}" for record in records if "repeats" in record]
    told = f"{', '.join(numbers)} s a slice {note}" if numbers else note
    tell(what, state, f"{told} ({time.monotonic() - begun:.0f} s)")


def unfit(task: Task) -> str:
    """Why a task cannot be run here; empty if it can."""
    if task.mode and MODES[task.mode].gpu_only and task.device != "cuda":
        return "needs a CUDA GPU"
    return ""


def tell(what: str, state: str, note: str) -> None:
    print(f"{what:<28}{state:<14}{note}", flush=True)


def save(results: dict[str, Any], folder: Path) -> None:
    text = json.dumps(results, indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def load_before(seconds: float = 2.0) -> float:
    """Share of the cores that is in use before anything of ours runs."""
    with Others() as others:
        time.sleep(seconds)
        return others.share()


def arguments(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
        def parse(text: str) -> tuple[str, ...]:
            chosen = tuple(text.split(","))
            if unknown := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
            return chosen

        return parse

    def numbers(text: str) -> tuple[int, ...]:
        values = tuple(sorted({int(word) for word in text.split(",")}))
        if values[0] < 1:
            raise argparse.ArgumentTypeError("batches must be 1 or more")
        return values

    parser.add_argument("--presets", type=names(list(Preset)), default=tuple(str(preset) for preset in Preset)[::-1])
    parser.add_argument("--batches", type=numbers, help="default: 1,4,8 on a CPU, 1,4,8,16,32 on a GPU")
    parser.add_argument("--modes", type=names(list(MODES)), help="default: what is worth its time on the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cpu_count())
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of all runs, after some seconds for the machine's peaks"
    )
    parser.add_argument("--size", type=int, default=256, help="of a slice; a multiple of 16")
    parser.add_argument("--allow-busy", action="store_true", help="measure although others use the machine")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.size % 16:
        parser.error("--size must be a multiple of 16")
    if options.batches is None:
        options.batches = (1, 4, 8) if options.device == "cpu" else (1, 4, 8, 16, 32)
    return options


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options = arguments(parser)
    if options.task:
        return measured_here(options)
    if importlib.util.find_spec("diffusers") is None:
        parser.exit(2, "diffusers is missing, which builds the networks: pip install diffusers -c constraints.txt\n")
    os.environ["DIFFUSERS_VERBOSITY"] = "error"  # it warns of each change of precision
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "torch finds no CUDA GPU; choose --device cpu\n")
    options.load = load_before()
    if options.load > BUSY and not options.allow_busy:
        parser.exit(
            2,
            f"Others use {options.load:.0%} of the cores, so times would not be this program's; "
            "wait, or choose --allow-busy and have the report say so.\n",
        )
    write_report(measure(options), options.out)
    print(f"{options.out / 'report.md'}")


def measured_here(options: argparse.Namespace) -> None:
    """The process that measures one task."""
    with suppress(OSError):  # if memory runs out, the system shall end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    values = json.loads(options.task.read_text(encoding="utf-8"))
    task = Task(**{**values, "batches": tuple(values["batches"])})

    def write(record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record = record | {key: None}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    run_here(task, write)


if __name__ == "__main__":
    main()
