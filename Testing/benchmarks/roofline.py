"""What a backbone's pass asks of a machine, what the machine can give, and the shortest time that follows.

Counted, per operation of the traced network: floating point operations of convolutions, matrix products and attention;
the exponentials of softmax; bytes read and written. Measured: this machine's fastest convolution or matrix product, its
exponentials per second, its bytes per second by copies of several sizes. Each operation then takes at least as long as
the slowest of the three, and a pass at least the sum (the roofline model of Williams et al., CACM 2009, by operation,
with exponentials as a third roof: attention heads of width 16 ask for one exponential per 64 floating point operations,
which a GPU's tensor cores outrun).

Assumptions. One multiply-add is two operations. Softmax takes one exponential per head, query and key. Compute,
exponentials and memory overlap perfectly within an operation and not at all between operations. Attention keeps its
scores on the chip. Fused: convolutions, products and attention read their input and weights and write their output
once, normalization reads its input once more for the statistics, everything pointwise (activation, sum, join, resize,
copy) costs nothing. Not fused, as eager execution is: each operation reads and writes all it is given. Data that fits a
cache moves at the speed of a copy of that size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from LCTfoundLib.networks.backbone import CHANNELS, EMBEDDING_SIZE

__all__ = ["Kind", "Limit", "Operation", "Peaks", "limit", "measure_peaks", "torch_flops", "trace"]


class Kind(StrEnum):
    """What an operation mostly is."""

    CONVOLUTION = "convolution"
    MATMUL = "matrix product"
    ATTENTION = "attention"
    NORMALIZATION = "normalization"
    POINTWISE = "pointwise"


@dataclass(frozen=True)
class Operation:
    """One operation of a pass.

    Attributes:
        kind: what it is.
        name: torch's.
        positions: places of its output per slice (H x W, or tokens).
        flops: floating point operations; only of convolutions, matrix products and attention.
        exponentials: of softmax.
        read: bytes of its inputs and weights.
        written: bytes of its outputs.
    """

    kind: Kind
    name: str
    positions: int
    flops: int
    exponentials: int
    read: int
    written: int

    def moved(self, fused: bool) -> int:
        """Bytes to and from memory."""
        if not fused or self.kind in (Kind.CONVOLUTION, Kind.MATMUL, Kind.ATTENTION):
            return self.read + self.written
        return self.read if self.kind is Kind.NORMALIZATION else 0


def trace(network: nn.Module, batch: int = 1, size: int = 256) -> list[Operation]:
    """The operations of one pass, from shapes alone.

    Args:
        network: a backbone on the ``meta`` device, in the precision to count bytes for.
        batch: slices.
        size: height and width of a slice.
    """
    operations: list[Operation] = []
    given = _inputs(network, batch, size)
    with torch.no_grad(), _Attention(operations), _Others(operations, batch):
        network(*given)
    return operations


def torch_flops(network: nn.Module, batch: int = 1, size: int = 256) -> int:
    """Floating point operations of the same pass as torch's own counter has them: the check of :func:`trace`."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*_inputs(network, batch, size))
    return counter.get_total_flops()


def _inputs(network: nn.Module, batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = next(network.parameters()).dtype
    return (
        torch.empty(batch, CHANNELS, size, size, device="meta", dtype=dtype),
        torch.zeros(batch, device="meta", dtype=torch.long),
        torch.empty(batch, 1, EMBEDDING_SIZE, device="meta", dtype=dtype),
    )


class _Attention(TorchFunctionMode):
    """Takes note of attention before torch splits it into products and a softmax, which differs between devices."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = _query_key_value(*args, **(kwargs or {}))
        scores = query.shape[:-1].numel() * key.shape[-2]  # batch x heads x queries x keys
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        flops = 2 * scores * (query.shape[-1] + value.shape[-1])
        read = _bytes((query, key, value))
        self.operations.append(
            Operation(Kind.ATTENTION, "attention", query.shape[-2], flops, scores, read, _bytes((result,)))
        )
        return result


def _query_key_value(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query, key, value


class _Others(TorchDispatchMode):
    """Takes note of all other operations as they reach the device."""

    def __init__(self, operations: list[Operation], batch: int) -> None:
        super().__init__()
        self.operations, self.batch = operations, batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _moves_nothing(func):
            self.operations.append(self._operation(func.overloadpacket.__name__, args, result))
        return result

    def _operation(self, name: str, args: Sequence[Any], result: Any) -> Operation:
        outputs = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
        kind, flops = Kind.POINTWISE, 0
        if name == "convolution":
            kind, flops = Kind.CONVOLUTION, 2 * result.numel() * args[1][0].numel()
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            kind, flops = Kind.MATMUL, 2 * result.numel() * args[-1].shape[-2]
        elif name in ("native_group_norm", "native_layer_norm"):
            kind = Kind.NORMALIZATION
        shape = outputs[0].shape
        channels = shape[1] if len(shape) == 4 else shape[-1] if shape else 1
        positions = shape.numel() // max(1, self.batch * channels)
        return Operation(kind, name, positions, flops, 0, _bytes(_tensors(args)), _bytes(outputs))


def _moves_nothing(func: Any) -> bool:
    """Views and bare allocations."""
    if func.overloadpacket.__name__ in ("_unsafe_view", "empty", "new_empty", "empty_like"):
        return True
    answers = func._schema.returns
    return bool(answers) and answers[0].alias_info is not None and not answers[0].alias_info.is_write


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found = []
    for item in args:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            found += _tensors(item)
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the stored values; a value that is only repeated by its stride counts once."""
    total = 0
    for tensor in tensors:
        values = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            values *= length if stride else min(length, 1)
        total += values * tensor.element_size()
    return total


@dataclass(frozen=True)
class Peaks:
    """The most that was seen of a machine.

    Attributes:
        flops: per second, by precision (``fp32``, ``bf16``), with what reached it.
        exponentials: per second, with what reached it.
        copies: (bytes read and written, bytes per second), small first; never slower for fewer bytes.
        reached_by: what reached each peak.
    """

    flops: dict[str, float]
    exponentials: float
    copies: list[tuple[int, float]]
    reached_by: dict[str, str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Peaks:
        """From :func:`dataclasses.asdict` after JSON."""
        return cls(**{**values, "copies": [(int(size), float(speed)) for size, speed in values["copies"]]})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the largest copy: memory."""
        return self.copies[-1][1]

    def seconds_to_move(self, count: int) -> float:
        """Shortest time for bytes: at the speed of the largest copy measured that is no larger (a faster one, if at
        all), so that the answer stays a limit."""
        speed = self.copies[0][1]
        for size, rate in self.copies:
            if size <= count:
                speed = rate
        return count / speed


@dataclass(frozen=True)
class Limit:
    """Shortest time of a pass, by what takes it.

    Attributes:
        compute, exponentials, memory: seconds of the operations that each of them holds up.
    """

    compute: float
    exponentials: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exponentials + self.memory

    @property
    def held_up_by(self) -> str:
        """The largest part."""
        return max(asdict(self), key=lambda cause: getattr(self, cause))


def limit(operations: Iterable[Operation], peaks: Peaks, precision: str, fused: bool = True) -> Limit:
    """The shortest time of operations one after the other."""
    total = dict.fromkeys(("compute", "exponentials", "memory"), 0.0)
    for operation in operations:
        times = {
            "compute": operation.flops / peaks.flops[precision],
            "exponentials": operation.exponentials / peaks.exponentials,
            "memory": peaks.seconds_to_move(operation.moved(fused)),
        }
        cause = max(times, key=lambda name: times[name])
        total[cause] += times[cause]
    return Limit(**total)


def measure_peaks(device: torch.device, seconds: float = 12.0) -> Peaks:
    """What this machine gives at its best, with the threads torch is set to.

    Args:
        device: to measure.
        seconds: to spend, about.
    """
    probes = _probes(device)
    copy_sizes = _COPY_SIZES[device.type == "cuda"]
    each = seconds / (len(probes) + len(copy_sizes))
    best: dict[str, tuple[float, str]] = {}
    for what, name, amount, make in probes:
        try:
            rate = amount / _fastest(make(), device, each)
        except RuntimeError:  # one way of several is missing here (no compiler, too little memory): the others stand
            continue
        best[what] = max(best.get(what, (0.0, "")), (rate, name))
    copies = [(size, size / _fastest(_copy(size, device), device, each)) for size in copy_sizes]
    for index in range(len(copies) - 2, -1, -1):  # starting a small copy takes longer than the copy
        copies[index] = (copies[index][0], max(copies[index][1], copies[index + 1][1]))
    flops = {precision: best[precision][0] for precision in ("fp32", "bf16")}
    return Peaks(flops, best["exponentials"][0], copies, {what: name for what, (_, name) in best.items()})


#: Bytes moved by a copy (half read, half written); the second for GPUs.
_COPY_SIZES = (
    tuple(2**power for power in (20, 22, 24, 26, 29)),
    tuple(2**power for power in (22, 24, 26, 28, 31)),
)

_Probe = tuple[str, str, float, Callable[[], Callable[[], Any]]]


def _probes(device: torch.device) -> list[_Probe]:
    """(of what, by what, how much of it a call does, its maker); inputs are made when a probe starts."""
    gpu = device.type == "cuda"
    probes: list[_Probe] = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for n in (4096, 8192) if gpu else (1024,):
            name = f"matrix product {n}"
            probes.append((precision, name, 2.0 * n**3, lambda n=n, dtype=dtype: _product(n, dtype, device)))
        for channels, side in ((256, 128), (512, 64)) if gpu else ((64, 128), (128, 64)):
            batch = 16 if gpu else 1
            name = f"convolution 3x3, {batch} x {channels} x {side} x {side}"
            amount = 2.0 * 9 * channels**2 * batch * side**2
            probes.append(
                (
                    precision,
                    name,
                    amount,
                    lambda c=channels, b=batch, s=side, dtype=dtype: _convolution(b, c, s, dtype, device),
                )
            )
        count = 2**22 if gpu else 2**18
        name = f"torch.exp of {count} {precision}"
        probes.append(("exponentials", name, float(count), lambda n=count, dtype=dtype: _exponential(n, dtype, device)))
        tokens = 8192 if gpu else 2048
        probes.append(
            (
                "exponentials",
                f"attention of 8 heads, {tokens} tokens, width 16, {precision}",
                8.0 * tokens**2,
                lambda n=tokens, dtype=dtype: _attention(n, dtype, device),
            )
        )
    if gpu:
        count = 2**22
        name = f"{_CHAIN} exponentials in a row on each of {count} values"
        probes.append(("exponentials", name, float(count * _CHAIN), lambda: _exponential_chain(count, device)))
    return probes


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _convolution(batch: int, channels: int, side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    image = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    image, kernel = (part.contiguous(memory_format=torch.channels_last) for part in (image, kernel))
    return lambda: F.conv2d(image, kernel, padding=1)


def _exponential(count: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    values = torch.randn(count, device=device, dtype=dtype)
    out = torch.empty_like(values)
    return lambda: torch.exp(values, out=out)


def _attention(tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    query = torch.randn(1, 8, tokens, 16, device=device, dtype=dtype)
    return lambda: F.scaled_dot_product_attention(query, query, query)


_CHAIN = 256


def _exponential_chain(count: int, device: torch.device) -> Callable[[], Any]:
    """The GPU's special function units, which a plain ``exp`` leaves waiting for memory; compiled by the driver's own
    runtime compiler, so that no other is needed."""
    code = f"template <typename T> T chain(T x) {{ for (int i = 0; i < {_CHAIN}; ++i) x = __expf(-x); return x; }}"
    chain = torch.cuda.jiterator._create_jit_fn(code)
    values = torch.rand(count, device=device)
    return lambda: chain(values)


def _copy(moved: int, device: torch.device) -> Callable[[], Any]:
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _fastest(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of one call, the fastest of several rounds long enough to be timed."""

    def round_of(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        round_of(1)
        count = max(1, int(0.02 / max(round_of(2) / 2, 1e-7)))
        end, best = time.perf_counter() + seconds, float("inf")
        while time.perf_counter() < end or best == float("inf"):
            best = min(best, round_of(count) / count)
    return best
