"""Where to compute and in which precision, with the reasons; free memory; what the doctor shows."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from LCTfoundLib.errors import LCTfoundError

__all__ = ["DeviceChoice", "Precision", "choose_device", "choose_precision", "cpu_count", "describe", "free_memory"]

_CGROUP = Path("/sys/fs/cgroup")


class Precision(StrEnum):
    """Number format of the networks' arithmetic."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.value]


@dataclass(frozen=True)
class DeviceChoice:
    """A device and a precision, and why.

    Attributes:
        device: where the networks run.
        precision: number format for them.
        name: of the hardware, to show.
        reason: why this device and precision, one sentence each.
    """

    device: torch.device
    precision: Precision
    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    def cpu_fallback(self) -> DeviceChoice:
        """The CPU, for when this device's memory does not suffice."""
        return _choice(torch.device("cpu"), None, f"The memory of {self.name} does not suffice.")


def choose_device(wanted: str = "auto", precision: str | Precision | None = None) -> DeviceChoice:
    """The device to use.

    A device counts as usable only when it runs a small 3D convolution: a GPU may be there and yet too old for this
    build of torch, or lack an operation.

    Args:
        wanted: ``auto`` (cuda before mps before cpu), ``cuda``, ``cuda:1``, ``mps`` or ``cpu``.
        precision: ``fp32``, ``fp16`` or ``bf16``; default: the fastest that is safe there.

    Raises:
        LCTfoundError: unknown name, or a device that was asked for cannot be used.
    """
    fixed = None if precision is None else _precision_of(precision)
    if wanted != "auto":
        device = _device_of(wanted)
        problem = _problem_with(device)
        if problem:
            raise LCTfoundError(f"The device '{wanted}' cannot be used ({problem}); choose 'auto' or 'cpu'.")
        return _choice(device, fixed, f"'{wanted}' was asked for.")
    passed_over = []
    for name in ("cuda", "mps"):
        problem = _problem_with(torch.device(name))
        if not problem:
            return _choice(torch.device(name), fixed, "It is the fastest usable device here.")
        passed_over.append(f"{name}: {problem}")
    return _choice(torch.device("cpu"), fixed, f"No accelerator is usable ({'; '.join(passed_over)}).")


def choose_precision(device: torch.device) -> tuple[Precision, str]:
    """The fastest safe number format of a device, and the reason.

    bfloat16 is preferred over float16 where both are fast: it has float32's range, so that an activation cannot
    overflow. It is chosen on a CPU only where the hardware multiplies it (twice as fast there; else it is emulated
    and slower than float32).
    """
    if device.type == "cuda":
        return _cuda_precision(device)
    if device.type == "mps":
        return Precision.FP32, "fp32: half precision brings little on Apple GPUs and lacks operations."
    if _cpu_has_native_bf16():
        return Precision.BF16, "bf16: this CPU computes it natively, about twice as fast as fp32."
    return Precision.FP32, "fp32: this CPU has no native half precision."


def _cuda_precision(device: torch.device) -> tuple[Precision, str]:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return Precision.BF16, "bf16: tensor cores, with the range of fp32."
    # Cards of the GTX 16 line report 7.5 but have no tensor cores, and yield NaN in half precision.
    if capability >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device):
        return Precision.FP16, "fp16: tensor cores of this generation know no bf16."
    return Precision.FP32, "fp32: this GPU has no tensor cores."


def _cpu_has_native_bf16() -> bool:
    """AVX512-BF16, AMX or ARM's BF16. The private probes of torch are the only ones there are; without them: no."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported"):
        function = getattr(torch.cpu, probe, None)
        if function is not None and function():
            return True
    return False


def cpu_count() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be allocated on a device (on the CPU: within the container's limit, if it has one)."""
    device = torch.device(device)
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused_by_torch
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    available = int(psutil.virtual_memory().available)
    limit = _cgroup_free(_CGROUP)
    return available if limit is None else min(available, limit)


def _cgroup_free(root: Path) -> int | None:
    """What is left of a container's memory limit (cgroup v2); None where there is none."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        statistics = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        reclaimable = int(statistics.get("inactive_file", 0))
        return max(0, int(limit) - int((root / "memory.current").read_text()) + reclaimable)
    except (OSError, ValueError):
        return None


def describe(wanted: str = "auto") -> list[tuple[str, str]]:
    """(what, value) lines about the machine and the choice made on it, for the doctor."""
    lines = [
        ("System", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CPU", f"{_cpu_name()}, {cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
        ("Memory", f"{_gigabytes(psutil.virtual_memory().total)}, {_gigabytes(free_memory())} free"),
    ]
    lines += [(f"GPU {index}", _gpu_line(index)) for index in range(_cuda_count())]
    lines += [
        (name, problem or "usable")
        for name, problem in ((n, _problem_with(torch.device(n))) for n in ("cuda", "mps", "cpu"))
    ]
    try:
        choice = choose_device(wanted)
        lines += [("Device used", f"{choice.device}: {choice.name}"), ("Why", choice.reason)]
    except LCTfoundError as error:
        lines.append(("Device used", str(error)))
    return lines


def _choice(device: torch.device, precision: Precision | None, reason: str) -> DeviceChoice:
    if precision is None:
        precision, why = choose_precision(device)
    else:
        why = f"{precision.value} was asked for."
    return DeviceChoice(device, precision, _name_of(device), f"{reason} {why}")


def _precision_of(name: str | Precision) -> Precision:
    try:
        return Precision(name)
    except ValueError:
        known = ", ".join(item.value for item in Precision)
        raise LCTfoundError(f"There is no precision '{name}'; choose one of {known}.") from None


def _device_of(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (index and not index.isdecimal()) or name.endswith(":"):
        raise LCTfoundError(f"There is no device '{name}'; choose auto, cuda, cuda:0, mps or cpu.")
    return torch.device(name)


@lru_cache(maxsize=16)
def _problem_with(device: torch.device) -> str:
    """Why a device cannot be used; empty when it works. Found out once per process."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU found" if torch.backends.cuda.is_built() else "this torch is built without CUDA"
    if device.type == "cuda" and (device.index or 0) >= _cuda_count():
        return f"there are only {_cuda_count()} CUDA GPUs"
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "no Apple GPU found"
    if device.type == "cpu":
        return ""
    try:
        _try_convolutions(device)
    except (RuntimeError, NotImplementedError) as error:
        return f"it fails on a 3D convolution: {str(error).splitlines()[0][:120]}"
    return ""


def _try_convolutions(device: torch.device) -> None:
    """The operations of the networks, on a tiny input, against the CPU's answer."""
    image = torch.linspace(-1, 1, 4**3).view(1, 1, 4, 4, 4)
    kernel = torch.linspace(-1, 1, 2**3).view(1, 1, 2, 2, 2)

    def both_ways(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv_transpose3d(torch.nn.functional.conv3d(x, w, stride=2), w, stride=2)

    answer = both_ways(image.to(device), kernel.to(device)).cpu()
    if not torch.allclose(answer, both_ways(image, kernel), rtol=0.05, atol=0.05):
        raise RuntimeError("wrong result")


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu_line(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {_gigabytes(total)}, {_gigabytes(free)} free"


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else _cpu_name()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.1f} GB"
