"""The acceleration report: what the measured numbers say, and which way of running follows from them by rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Choice", "choose", "compiled_gain", "preset_for", "targets", "write_report"]

#: A mode whose answer differs from fp32 by more than this share of it is no candidate.
MAX_DIFFERENCE = 0.05
#: Within this share of the fastest, the plainer wins: fp32 before bf16, a small batch before a large one.
TIE = 0.05
#: Compilation is worth it when it is won back within a scan, with this gain.
SCAN_SLICES, WORTHWHILE_GAIN = 300, 1.2
#: A user waits this long for one pass over a scan, at most; the largest preset that keeps to it is recommended.
PATIENCE_SECONDS = 300.0
#: A number is marked when others used more of the cores than this, or repeats spread more.
BUSY, SPREAD = 0.1, 0.25
#: Largest first.
SIZES = ("paper", "lite", "student")

Run = Mapping[str, Any]
Results = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """How to run a preset.

    Attributes:
        run: the measured one.
        fastest: of all that were candidates; the same, or faster by less than a tie.
    """

    run: Run
    fastest: Run

    @property
    def seconds(self) -> float:
        """A slice."""
        return float(self.run["seconds"])


def measured(results: Results, preset: str | None = None) -> list[Run]:
    """Runs that gave a number."""
    return [run for run in results["runs"] if run["state"] == "measured" and preset in (None, run["preset"])]


def choose(results: Results, preset: str) -> Choice | None:
    """The mode and batch to run a preset with where no compiler can be counted on; None when nothing was measured."""
    modes = results["modes"]
    candidates = [
        run
        for run in measured(results, preset)
        if not modes[run["mode"]]["compiled"] and _error(results, run) <= MAX_DIFFERENCE
    ]
    if not candidates:
        return None
    fastest = min(candidates, key=lambda run: run["seconds"])
    tied = [run for run in candidates if run["seconds"] <= fastest["seconds"] * (1 + TIE)]

    def plainness(run: Run) -> tuple[Any, ...]:
        mode = modes[run["mode"]]
        return mode["precision"] != "fp32", mode["graphs"], run["batch"], run["seconds"]

    return Choice(min(tied, key=plainness), fastest)


def _error(results: Results, run: Run) -> float:
    """Difference of a run's mode from fp32, which was compared at one batch; 0 where it was not compared."""
    found = [
        other["difference"]
        for other in measured(results, run["preset"])
        if other["mode"] == run["mode"] and other["difference"] is not None
    ]
    return max(found, default=0.0)


def compiled_gain(results: Results, preset: str) -> tuple[Run, float, float] | None:
    """The fastest compiled run, its gain over the choice, and slices until its compilation is won back."""
    choice = choose(results, preset)
    runs = [
        run
        for run in measured(results, preset)
        if results["modes"][run["mode"]]["compiled"] and _error(results, run) <= MAX_DIFFERENCE
    ]
    if choice is None or not runs:
        return None
    run = min(runs, key=lambda run: run["seconds"])
    saved = choice.seconds - run["seconds"]
    compiling = max(0.0, run["first"] - run["seconds"] * run["batch"])
    return run, choice.seconds / run["seconds"], compiling / saved if saved > 0 else math.inf


def preset_for(results: Results) -> tuple[str, bool] | None:
    """The largest preset that passes over a scan in the time a user waits, else the fastest; and whether it does."""
    choices = {preset: choose(results, preset) for preset in SIZES if preset in results["presets"]}
    known = {preset: choice for preset, choice in choices.items() if choice is not None}
    for preset, choice in known.items():
        if choice.seconds * SCAN_SLICES <= PATIENCE_SECONDS:
            return preset, True
    return (min(known, key=lambda preset: known[preset].seconds), False) if known else None


def targets(results: Results) -> list[tuple[str, str, str]]:
    """(target, measured, verdict); what was not measured here says so."""
    gpu = results["machine"]["kind"] == "cuda"
    lines = []
    plain = _fastest(results, "student", ("eager", "channels-last"), batch=1)
    if not gpu:
        seconds = plain["seconds"] if plain else None
        told = f"{seconds:.3f} s ({plain['mode']})" if plain and seconds else "not measured"
        what = f"student, not compiled, fp32, one slice on {results['machine']['threads']} cores: <= 0.45 s a slice"
        lines.append((what, told, _verdict(seconds, lambda value: value <= 0.45)))
    eager, best = _fastest(results, "paper", ("eager",)), _fastest(results, "paper", tuple(results["modes"]))
    gain = eager["seconds"] / best["seconds"] if gpu and eager and best else None
    what = "paper on an H100-class GPU: >= 2 x eager diffusers, each at its best batch"
    told = f"{gain:.2f} x ({_label(best)})" if gain and best else "not measured here"
    lines.append((what, told, _verdict(gain, lambda value: value >= 2)))
    for way, name in (("clean", "one clean map"), ("all", "all four timesteps by heads")):
        ratios = {
            (run["preset"], run["batch"]): four_timesteps(run) / run[way]
            for run in results["features"]
            if run["state"] == "measured"
        }
        ratio = min(ratios.values(), default=None)  # the target is to hold for all that was measured
        told = "not measured" if ratio is None else f"{ratio:.2f} x at least, {max(ratios.values()):.2f} x at most"
        what = f"features of a single pass, {name}: >= 3.5 x faster than four timesteps"
        lines.append((what, told, _verdict(ratio, lambda value: value >= 3.5)))
    return lines


def four_timesteps(run: Run) -> float:
    """Seconds a slice of the better way through four timesteps: the rival of a single pass."""
    return float(min(run["together"], run["apart"]))


def _fastest(results: Results, preset: str, modes: Sequence[str], batch: int | None = None) -> Run | None:
    runs = [
        run for run in measured(results, preset) if run["mode"] in modes and (batch is None or run["batch"] == batch)
    ]
    return min(runs, key=lambda run: run["seconds"], default=None)


def _verdict(value: float | None, holds: Any) -> str:
    return "-" if value is None else "met" if holds(value) else "**missed**"


def _label(run: Run) -> str:
    return f"{run['mode']}, batch {run['batch']}"


# --- the report ---------------------------------------------------------------------------------------------------


def write_report(results: Results, folder: Path) -> None:
    """Write ``report.md`` and ``roofline.png`` into a folder."""
    sections = (
        _machine_part(results),
        _recommended_part(results),
        _targets_part(results),
        _times_part(results),
        _features_part(results),
        _counts_part(results),
        _method_part(results),
    )
    (folder / "report.md").write_text("\n".join(line for part in sections for line in part), encoding="utf-8")
    if results["peaks"]:
        draw(results, folder / "roofline.png")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 99) -> list[str]:
    """Markdown; columns from ``right`` on are numbers."""
    rule = ["---:" if number >= right else "---" for number in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)] + [""]


def _machine_part(results: Results) -> list[str]:
    machine, peaks = results["machine"], results["peaks"]
    lines = [
        "# Acceleration of the foundation model",
        "",
        f"{machine['device']}, {machine['threads']} CPU threads ({machine['capability']}), "
        f"{machine['memory'] / 2**30:.0f} GB, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}. Slices of {results['size']} x {results['size']}, random weights.",
        "",
    ]
    if results["load_before"] > BUSY:
        lines += [
            f"**Others used {results['load_before']:.0%} of the cores at the start: times are upper bounds.**",
            "",
        ]
    numbers = [*measured(results), *(run for run in results["features"] if run["state"] == "measured")]
    if busy := sum(run["others"] > BUSY for run in numbers):
        told = f"{busy} of {len(numbers)} times were taken while others used more than {BUSY:.0%} of the cores"
        lines += [f"**{told}: neither they nor what follows from them can be relied on.**", ""]
    if not peaks:
        return [*lines, "The machine's peaks could not be measured, so there are no limits below.", ""]
    by = peaks["reached_by"]
    rows = [
        ["fp32", f"{peaks['flops']['fp32'] / 1e9:,.0f} GFLOP/s", by["fp32"]],
        ["bf16", f"{peaks['flops']['bf16'] / 1e9:,.0f} GFLOP/s", by["bf16"]],
        ["exponentials", f"{peaks['exponentials'] / 1e9:,.2f} G/s", by["exponentials"]],
    ]
    rows += [
        [f"copy of {size / 2**20:,.0f} MB moved", f"{speed / 1e9:,.1f} GB/s", ""] for size, speed in peaks["copies"]
    ]
    if machine["kind"] == "cuda":
        tf32 = machine["tf32"]
        lines += [f"fp32 is TF32 in convolutions: {tf32['convolutions']}, in products: {tf32['products']}.", ""]
    if peaks["others"] > BUSY:
        lines += [f"**Others used {peaks['others']:.0%} of the cores meanwhile: the peaks are too low.**", ""]
    return [*lines, *_table(("measured peak", "", "reached by"), rows)]


def _recommended_part(results: Results) -> list[str]:
    lines = ["## What Slicer should use by default here, and why", ""]
    best = preset_for(results)
    if best is None:
        return [*lines, "Nothing was measured that could be recommended.", ""]
    preset, in_time = best
    minutes = choose(results, preset).seconds * SCAN_SLICES / 60  # type: ignore[union-attr]
    reason = (
        f"the largest that passes over {SCAN_SLICES} slices in {PATIENCE_SECONDS / 60:.0f} minutes"
        if in_time
        else f"none passes over {SCAN_SLICES} slices in {PATIENCE_SECONDS / 60:.0f} minutes, and it is the fastest"
    )
    lines += [f"- Preset **{preset}**: {reason} ({minutes:.1f} minutes), where its weights are there."]
    for name in results["presets"]:
        lines += _reasons(results, name)
    for run in results["features"]:
        if run["state"] == "measured":
            ratio = run["together"] / run["apart"]
            way = "timestep after timestep" if ratio > 1 else "all timesteps in one batch"
            lines.append(
                f"- Features of several timesteps, {run['preset']}, {run['batch']} slices at a time: {way} "
                f"({max(ratio, 1 / ratio):.2f} x as fast as the other way)."
            )
    return [*lines, ""]


def _reasons(results: Results, preset: str) -> list[str]:
    choice = choose(results, preset)
    if choice is None:
        return [f"- {preset}: nothing measured."]
    run, modes = choice.run, results["modes"]
    eager = _fastest(results, preset, ("eager",), run["batch"]) or _fastest(results, preset, ("eager",))
    gain = f", {eager['seconds'] / choice.seconds:.2f} x eager diffusers" if eager else ""
    lines = [
        f"- {preset}: **{run['mode']}** ({modes[run['mode']]['says']}), **batch {run['batch']}**: "
        f"{choice.seconds:.3f} s a slice{gain}, {run['memory'] / 2**30:.1f} GB."
    ]
    if choice.fastest is not run:
        saved = 1 - choice.fastest["seconds"] / choice.seconds
        lines += [f"  - {_label(choice.fastest)} is {saved:.0%} faster: a tie (up to {TIE:.0%}), and the plainer wins."]
    lines += _on_half_precision(results, preset, choice)
    return lines + _on_compilation(results, preset)


def _on_half_precision(results: Results, preset: str, choice: Choice) -> list[str]:
    modes = results["modes"]
    half = [
        name
        for name in modes
        if modes[name]["precision"] == "bf16" and not modes[name]["compiled"] and _fastest(results, preset, (name,))
    ]
    full = [name for name in modes if modes[name]["precision"] == "fp32" and not modes[name]["compiled"]]
    plain, best = _fastest(results, preset, full), _fastest(results, preset, half)
    if plain is None or best is None:
        return []
    ratio, error = plain["seconds"] / best["seconds"], _error(results, best)
    told = f"{ratio:.2f} x as fast as" if ratio > 1 else f"{1 / ratio:.2f} x slower than"
    much = f", too much to be used (more than {MAX_DIFFERENCE:.0%})" if error > MAX_DIFFERENCE else ""
    return [f"  - bf16 ({_label(best)}) is {told} fp32 ({_label(plain)}); its answer differs by {error:.1%}{much}."]


def _on_compilation(results: Results, preset: str) -> list[str]:
    found = compiled_gain(results, preset)
    if found is None:
        tried = [
            run for run in results["runs"] if run["preset"] == preset and results["modes"][run["mode"]]["compiled"]
        ]
        why = f" ({tried[0]['state']}: {tried[0]['note']})" if tried else ""
        return [f"  - Compilation off: not measured{why}."]
    run, gain, slices = found
    told = f"{_label(run)} takes {run['seconds']:.3f} s a slice, {gain:.2f} x as fast, after {run['first']:.0f} s"
    worthwhile = gain >= WORTHWHILE_GAIN and slices <= SCAN_SLICES
    if math.isinf(slices):
        return [f"  - Compilation off: {told}: nothing is won."]
    verdict = (
        "worth it on a server that has a compiler; off in Slicer, where none can be counted on"
        if worthwhile
        else f"off: it is to win {WORTHWHILE_GAIN} x and to pay within a scan of {SCAN_SLICES} slices"
    )
    return [f"  - Compilation: {told}, won back after {slices:,.0f} slices: {verdict}."]


def _targets_part(results: Results) -> list[str]:
    return ["## Targets", "", *_table(("target", "measured", ""), [list(line) for line in targets(results)])]


def _times_part(results: Results) -> list[str]:
    lines = ["## Seconds a slice", ""]
    header = (
        "preset",
        "mode",
        "batch",
        "s a slice",
        "x eager",
        "share of limit",
        "not fused",
        "GB",
        "first, s",
        "error",
        "",
    )
    rows = [_time_row(results, run) for run in results["runs"]]
    return [
        *lines,
        *_table(header, rows, right=2),
        "Median of the repeats after warm-up. x eager: against eager at the same batch (else at its best). Share of "
        "limit: the shortest time of the roofline with everything fused, over the measured time; not fused: with each "
        "operation reading and writing memory. GB: peak of the process"
        + (" on the GPU" if results["machine"]["kind"] == "cuda" else "")
        + ". First: the first pass, compilation included. Error: of the answer from eager fp32, as a share of its "
        f"norm. busy: others used more than {BUSY:.0%} of the cores; uneven: repeats spread by more than {SPREAD:.0%}; "
        "once: one repeat.",
        "",
    ]


def _time_row(results: Results, run: Run) -> list[str]:
    head = [run["preset"], run["mode"], str(run["batch"])]
    if run["state"] != "measured":
        return [*head, run["state"], "", "", "", "", "", "", run.get("note", "").replace("|", "/")]
    seconds = run["seconds"]
    eager = _fastest(results, run["preset"], ("eager",), run["batch"]) or _fastest(results, run["preset"], ("eager",))
    bound = _limit_of(results, run)
    remarks = [
        word
        for word, holds in (
            ("busy", run["others"] > BUSY),
            ("uneven", run["spread"] > SPREAD),
            ("once", run["repeats"] == 1),
        )
        if holds
    ]
    return [
        *head,
        f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.5f}",
        f"{eager['seconds'] / seconds:.2f}" if eager else "",
        f"{bound['seconds'] / seconds:.0%}" if "seconds" in bound else "",
        f"{bound['seconds_not_fused'] / seconds:.0%}" if "seconds" in bound else "",
        f"{run['memory'] / 2**30:.2f}",
        f"{run['first']:.1f}",
        "" if run["difference"] is None else f"{run['difference']:.1e}",
        ", ".join(remarks),
    ]


def _limit_of(results: Results, run: Run) -> Mapping[str, Any]:
    precision = results["modes"][run["mode"]]["precision"]
    return results["presets"][run["preset"]]["limits"][f"{precision} {run['batch']}"]


def _features_part(results: Results) -> list[str]:
    if not results["features"]:
        return []
    rows = []
    for run in results["features"]:
        head = [run["preset"], str(run["batch"])]
        if run["state"] != "measured":
            rows.append([*head, run["state"], "", "", "", "", "", run.get("note", "")])
            continue
        clean, everything = (four_timesteps(run) / run[way] for way in ("clean", "all"))
        remark = "busy" if run["others"] > BUSY else ""
        times = [f"{run[name]:.4f}" for name in ("together", "apart", "clean", "all")]
        rows.append([*head, *times, f"{clean:.2f}", f"{everything:.2f}", remark])
    header = ("preset", "slices", "one batch, s", "one by one, s", "clean, s", "all, s", "x (clean)", "x (all)", "")
    return [
        "## Features: four noisy passes or one clean one",
        "",
        *_table(header, rows, right=1),
        "Seconds a slice, of the same network, channels last, in turns. Four noisy timesteps: all of them and all "
        "slices in one batch, or timestep after timestep. A single pass: the clean maps, or from them all four "
        "timesteps by heads. x: against the faster of the first two. The heads are not trained here: how well they "
        "agree is measured where they are.",
        "",
    ]


def _counts_part(results: Results) -> list[str]:
    lines = ["## What a pass asks for, one slice", ""]
    rows = []
    for preset, facts in results["presets"].items():
        agrees = "equal" if facts["flops"] == facts["flops_by_torch"] else f"**{facts['flops_by_torch'] / 1e9:,.1f}**"
        for precision in ("fp32", "bf16"):
            batch = min(int(key.split()[1]) for key in facts["limits"])
            bound = facts["limits"][f"{precision} {batch}"]
            known = "seconds" in bound
            rows.append(
                [
                    preset,
                    precision,
                    f"{facts['parameters'] / 1e6:.2f}",
                    f"{facts['flops'] / 1e9:,.1f}",
                    agrees,
                    f"{facts['exponentials'] / 1e9:.3f}",
                    f"{bound['moved'] / 1e6:,.0f}",
                    f"{bound['moved_not_fused'] / 1e6:,.0f}",
                    f"{bound['seconds']:.5f}" if known else "",
                    f"{bound['held_up_by']} ({bound[bound['held_up_by']] / bound['seconds']:.0%})" if known else "",
                ]
            )
    header = (
        *("preset", "", "M parameters", "GFLOP", "torch's count", "G exponentials", "MB fused", "MB not fused"),
        *("limit, s", "held up by"),
    )
    lines += _table(header, rows, right=2)
    for preset, facts in results["presets"].items():
        rows = [
            [
                part["kind"],
                _side(part["positions"]),
                str(part["count"]),
                f"{part['flops'] / 1e9:,.1f}",
                f"{part['flops'] / facts['flops']:.0%}",
                f"{part['exponentials'] / 1e9:.3f}" if part["exponentials"] else "",
                f"{part['moved'] / 1e6:,.0f}",
            ]
            for part in facts["parts"]
            if part["flops"] >= 0.01 * facts["flops"]
        ]
        header = (preset, "map", "count", "GFLOP", "share", "G exponentials", "MB, fp32, fused")
        lines += _table(header, rows, right=2)
    return lines


def _side(positions: int) -> str:
    side = math.isqrt(positions)
    return f"{side} x {side}" if side * side == positions else str(positions)


def _method_part(results: Results) -> list[str]:
    return [
        "## Method",
        "",
        "Counts come from shapes (`Testing/benchmarks/roofline.py`, with its assumptions) and are compared with "
        "`torch.utils.flop_counter`. The limit adds up, operation by operation, the longest of computing at the "
        "measured peak of the precision, of its exponentials, and of moving its bytes at the measured speed of a copy "
        "that large. Each mode of each preset ran in a process of its own. Rules: a candidate needs no compiler and "
        f"differs from fp32 by at most {MAX_DIFFERENCE:.0%}; within {TIE:.0%} of the fastest, fp32 goes before bf16 "
        f"and a small batch before a large one; compilation is worth it from {WORTHWHILE_GAIN} x on when it pays "
        f"within {SCAN_SLICES} slices; of the presets the largest that passes over a scan of {SCAN_SLICES} slices in "
        f"{PATIENCE_SECONDS / 60:.0f} minutes. "
        f"Time allowed: {results['minutes']:g} minutes.",
        "",
    ]


# --- the picture --------------------------------------------------------------------------------------------------

_COLORS = {"compute": "#3b6fb6", "exponentials": "#d9822b", "memory": "#6a9f58"}
_MODE_COLORS = ("#222222", "#3b6fb6", "#8c6bb1", "#d9822b", "#c44e52", "#17807e", "#6a9f58", "#b5a642", "#e377c2")
_WIDTH, _LEFT, _TOP, _PLOT = 1200, 90, 70, (820, 440)
_BARS_TOP, _BAR = _TOP + _PLOT[1] + 80, 34


def draw(results: Results, path: Path) -> None:
    """Above: floating point operations per second over operations per byte, with the roofs. Below: what the limit of
    each preset is made of."""
    from PIL import Image, ImageDraw, ImageFont

    height = _BARS_TOP + _BAR * (2 * len(results["presets"]) + 2)
    image = Image.new("RGB", (_WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(15), ImageFont.load_default(20)
    title = (
        f"{results['machine']['device']}, {results['machine']['threads']} threads, {results['size']}x{results['size']}"
    )
    pen.text((_LEFT, 20), title, fill="black", font=large)
    _draw_roofs(pen, results, small)
    _draw_bars(pen, results, small)
    image.save(path)


@dataclass(frozen=True)
class _Axes:
    """Both logarithmic: powers of ten from ``low`` to ``high``."""

    low: tuple[float, float]
    high: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        right, up = (
            (math.log10(value) - low) / (high - low)
            for value, low, high in zip((x, y), self.low, self.high, strict=True)
        )
        return _LEFT + right * _PLOT[0], _TOP + (1 - up) * _PLOT[1]


def _draw_roofs(pen: Any, results: Results, font: Any) -> None:
    peaks = results["peaks"]
    bandwidth, top = peaks["copies"][-1][1], max(peaks["flops"].values())
    points = [(run, _point(results, run)) for run in measured(results)]
    reach = [x for _, (x, _) in points] + [top / bandwidth]
    heights = [y for _, (_, y) in points] + [top]
    axes = _Axes(
        (math.floor(math.log10(min(reach) / 3)), math.floor(math.log10(min(heights)))),
        (math.ceil(math.log10(max(reach) * 2)), math.ceil(math.log10(top * 1.2))),
    )
    _draw_grid(pen, axes, font)
    for precision, peak in peaks["flops"].items():
        knee, end, start = peak / bandwidth, 10 ** axes.high[0], 10 ** axes.low[0]
        begin = max(start, 10 ** axes.low[1] / bandwidth)
        pen.line([axes.at(begin, begin * bandwidth), axes.at(knee, peak), axes.at(end, peak)], fill="black", width=2)
        x, y = axes.at(end, peak)
        pen.text((x - 150, y - 20), f"{precision} {peak / 1e9:,.0f} GFLOP/s", fill="black", font=font)
    x, y = axes.at(10 ** axes.low[0], 10 ** axes.low[1])
    pen.text(
        (x, y + 24), f"floating point operations per byte (fused); memory {bandwidth / 1e9:,.0f} GB/s", "black", font
    )
    for run, (intensity, rate) in points:
        _draw_mark(pen, run["preset"], axes.at(intensity, rate), _color(results, run["mode"]))
    _draw_key(pen, results, font)


def _point(results: Results, run: Run) -> tuple[float, float]:
    """Operations per byte, and per second."""
    flops = results["presets"][run["preset"]]["flops"]
    return flops / _limit_of(results, run)["moved"], flops / run["seconds"]


def _draw_grid(pen: Any, axes: _Axes, font: Any) -> None:
    for power in range(int(axes.low[0]), int(axes.high[0]) + 1):
        x, y = axes.at(10.0**power, 10 ** axes.low[1])
        pen.line([(x, y), (x, _TOP)], fill="#dddddd")
        pen.text((x - 8, y + 4), f"{10.0**power:g}", fill="black", font=font)
    for power in range(int(axes.low[1]), int(axes.high[1]) + 1):
        x, y = axes.at(10 ** axes.low[0], 10.0**power)
        pen.line([(x, y), (x + _PLOT[0], y)], fill="#dddddd")
        pen.text((8, y - 9), f"{10.0 ** (power - 9):g} G/s", fill="black", font=font)


def _draw_mark(pen: Any, preset: str, place: tuple[float, float], color: str) -> None:
    x, y = place
    if preset == "paper":
        pen.rectangle((x - 6, y - 6, x + 6, y + 6), outline=color, width=3)
    elif preset == "lite":
        pen.polygon([(x, y - 8), (x + 8, y + 6), (x - 8, y + 6)], outline=color, width=3)
    else:
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), outline=color, width=3)


def _color(results: Results, mode: str) -> str:
    return _MODE_COLORS[list(results["modes"]).index(mode) % len(_MODE_COLORS)]


def _draw_key(pen: Any, results: Results, font: Any) -> None:
    x, y = _LEFT + _PLOT[0] + 40, _TOP + 10
    for preset in results["presets"]:
        _draw_mark(pen, preset, (x, y + 9), "black")
        pen.text((x + 20, y), preset, fill="black", font=font)
        y += 24
    used = {run["mode"] for run in measured(results)}
    for mode in (name for name in results["modes"] if name in used):
        pen.rectangle((x - 6, y + 3, x + 6, y + 15), fill=_color(results, mode))
        pen.text((x + 20, y), mode, fill="black", font=font)
        y += 24


def _draw_bars(pen: Any, results: Results, font: Any) -> None:
    x, y, width = _LEFT + 80, _BARS_TOP, 540
    pen.text((_LEFT, y), "What the shortest time of a slice is made of", fill="black", font=font)
    place = x + 330
    for cause, color in _COLORS.items():
        pen.rectangle((place, y + 3, place + 12, y + 15), fill=color)
        pen.text((place + 18, y), cause, fill="black", font=font)
        place += 130
    y += _BAR
    for preset, facts in results["presets"].items():
        for precision in ("fp32", "bf16"):
            batch = min(int(key.split()[1]) for key in facts["limits"])
            bound, start = facts["limits"][f"{precision} {batch}"], float(x)
            pen.text((_LEFT - 20, y + 3), f"{preset} {precision}", fill="black", font=font)
            for cause, color in _COLORS.items():
                end = start + width * bound[cause] / bound["seconds"]
                pen.rectangle((start, y, end, y + 22), fill=color)
                start = end
            pen.text((x + width + 12, y + 3), _bar_label(results, preset, precision, bound), fill="black", font=font)
            y += _BAR


def _bar_label(results: Results, preset: str, precision: str, bound: Mapping[str, Any]) -> str:
    modes = [name for name, mode in results["modes"].items() if mode["precision"] == precision]
    best = _fastest(results, preset, modes)
    limit = f"limit {bound['seconds']:.4f} s"
    if best is None:
        return limit
    share = _limit_of(results, best)["seconds"] / best["seconds"]
    return f"{limit}; best {best['seconds']:.4f} s, {share:.0%} ({_label(best)})"
