"""The shell: ``python -m LCTfoundLib segment-lungs IN OUT``, ``reconstruct sparse-view IN OUT``, ``generate OUT``, ...

Results go to standard output, one folder a line (with ``--jsonl`` one JSON object a line); progress, warnings and
errors go to standard error. Exit codes: 0 done, 1 unexpected error or some cases of a batch failed, 2 something the
user can mend, 130 stopped by the user.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import LCTfoundLib
from LCTfoundLib.case import CaseOptions, CaseRecord, Engine, real_engine, run_case
from LCTfoundLib.errors import Cancelled, LCTfoundError
from LCTfoundLib.export.options import TRIANGLES, Frame
from LCTfoundLib.runtime.crash_log import write_crash_log
from LCTfoundLib.runtime.progress import CancelToken, JsonLines, Progress, Report

if TYPE_CHECKING:
    from LCTfoundLib.tasks.generation import GenerationRequest

__all__ = ["ExitCode", "main"]


#: A log file gets no more than a line in so many seconds for the same tenth of the work.
_QUIET_SECONDS = 10.0


class ExitCode(int, Enum):
    """What the shell learns of a run."""

    DONE = 0
    FAILED = 1
    USER_ERROR = 2
    CANCELLED = 130


class Console:
    """What the user sees: results on ``out``, everything else on ``err``.

    Args:
        jsonl: one JSON object a line on ``out`` for everything: ``progress``, ``warning``, ``result``, ``error``, ...
        out: default: standard output.
        err: default: standard error.
    """

    def __init__(self, jsonl: bool, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.events = JsonLines(self.out) if jsonl else None
        self.cancel = CancelToken()
        self._line_open = False
        self._told: tuple[str, int] = ("", -1)
        self._told_at = 0.0

    def progress(self, prefix: str = "") -> Progress:
        """A new progress that shows here and stops with Ctrl-C."""
        listener = self.events or (lambda report: self._show(report, prefix))
        return Progress(listener, self.warn, self.cancel)

    def event(self, kind: str, **fields: Any) -> None:
        """A JSON line, in JSON mode only."""
        if self.events:
            self.events.write(kind, **fields)

    def result(self, folder: Path, **details: Any) -> None:
        """A finished result folder."""
        self.event("result", folder=str(folder), **details)
        self.text(str(folder))

    def text(self, text: str) -> None:
        """Text meant for standard output; left out in JSON mode, where :meth:`event` speaks."""
        self._close_line()
        if not self.events:
            print(text, file=self.out, flush=True)

    def note(self, text: str) -> None:
        """A sentence for a person, on standard error."""
        self._close_line()
        print(text, file=self.err, flush=True)

    def warn(self, text: str) -> None:
        """Something that does not stop the run but should be read."""
        self.event("warning", message=text)
        self.note(f"Warning: {text}")

    def error(self, text: str) -> None:
        """What went wrong, in one sentence."""
        self.event("error", message=text)
        self.note(f"lctfound: {text}")

    def _show(self, report: Report, prefix: str) -> None:
        """Stage, share done and time left: one live line on a terminal, elsewhere a line each 10 % or some seconds."""
        left = "" if report.seconds_left is None else f", {_duration(report.seconds_left)} left"
        line = f"{prefix}{report.stage}: {100 * report.fraction:.0f} %{left}"
        if self.err.isatty():
            print(f"\r\x1b[K{line}", end="", file=self.err, flush=True)
            self._line_open = True
            return
        tenth, moment = int(10 * report.fraction), self._told_at
        if (prefix, tenth) != self._told or report.elapsed - moment >= _QUIET_SECONDS:
            self._told, self._told_at = (prefix, tenth), report.elapsed
            print(line, file=self.err, flush=True)

    def _close_line(self) -> None:
        if self._line_open:
            print("\r\x1b[K", end="", file=self.err, flush=True)
            self._line_open = False


def main(argv: Sequence[str] | None = None, engine: Engine | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program name; default: those of the process.
        engine: other steps of a case, for tests.
    """
    arguments = _parser().parse_args(argv)
    # Warnings come through the console; what is logged must not come a second time by the last resort of ``logging``.
    logging.getLogger(LCTfoundLib.__name__).addHandler(logging.NullHandler())
    console = Console(arguments.jsonl)
    try:
        with _stoppable(console.cancel):
            return int(arguments.run(arguments, console, engine))
    except (Cancelled, KeyboardInterrupt):
        console.error("Stopped; nothing unfinished was left behind.")
        return ExitCode.CANCELLED
    except LCTfoundError as error:
        console.error(str(error))
        return ExitCode.USER_ERROR
    except BrokenPipeError:  # the reader went away, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:
        log = write_crash_log(error, f"arguments: {sys.argv[1:]}")
        console.error(f"An unexpected error happened ({type(error).__name__}); please report it with the log {log}")
        return ExitCode.FAILED


@contextmanager
def _stoppable(cancel: CancelToken) -> Iterator[None]:
    """Ctrl-C and a polite kill stop the run once; further ones do not disturb the cleaning up."""

    def stop(number: int, frame: object) -> None:
        if not cancel.cancelled:
            cancel.cancel()
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # the caller handles signals
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lctfound", description="Lung CT: 21 anatomical structures. Research use only."
    )
    parser.add_argument("--version", action="version", version=f"LCTfound {LCTfoundLib.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_segment_lungs(commands)
    _add_demo(commands)
    _add_generate(commands)
    _add_reconstruct(commands)
    _add_doctor(commands)
    _add_weights(commands)
    _add_worker(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    """A subcommand with the options that all have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--jsonl", action="store_true", help="write one JSON object a line to standard output")
    parser.add_argument("--weights-folder", type=Path, help="take the weights from here")
    parser.set_defaults(run=run)
    return parser


def _add_case_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: the fastest")
    parser.add_argument("--quality", choices=["fast", "standard", "full"], default="standard")
    parser.add_argument("--format", default="", metavar="A,B,...", help="what to write (default: all)")
    parser.add_argument("--structures", default="", metavar="A,B,...", help="keys of the volumes table (default: 21)")
    parser.add_argument("--triangles", type=int, default=TRIANGLES, help="of all models (default: %(default)s)")
    parser.add_argument("--frame", choices=list(Frame), default=Frame.LPS, help="of the models (default: %(default)s)")
    parser.add_argument("--single-file", action="store_true", help="one model file with all structures")


def _add_segment_lungs(commands: Any) -> None:
    text = "Segment airway, artery, vein, lobes and the 18 segments of a chest CT."
    parser = _command(commands, "segment-lungs", _segment_lungs, text)
    parser.add_argument("input", type=Path, metavar="IN", help="DICOM folder, NIfTI, NRRD or MHA file")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the result")
    parser.add_argument("--batch", action="store_true", help="IN is a folder of studies; finished ones are skipped")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    _add_case_options(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _demo, "Segment the CT of a real patient (LIDC-IDRI-0001).")
    parser.add_argument("output", type=Path, nargs="?", metavar="OUT", help="default: output/demo")
    _add_case_options(parser)


def _add_generate(commands: Any) -> None:
    text = "Generate synthetic CT images, marked as such. Research use only."
    parser = _command(commands, "generate", _generate, text)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the images")
    parser.add_argument("--window", default="lung", help="mediastinal, lung or WIDTH,LEVEL (default: %(default)s)")
    parser.add_argument(
        "--condition", action="append", default=[], metavar="TERM", help="disease to show; may be repeated"
    )
    parser.add_argument("--count", type=int, default=1, help="of images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--sampler", default="dpm-solver++", help="ddim, dpm-solver++ or unipc (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="exaggerates the condition above 1 (default: off)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--backbone", metavar="NAME_OR_FOLDER", help="weight, or folder of the official checkpoint")
    parser.add_argument("--language-model", type=Path, metavar="FOLDER", help="BERT base model that encodes conditions")
    parser.add_argument("--language", choices=["chinese", "english"], default="chinese", help="of the terms told to it")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: the fastest)")
    parser.add_argument("--precision", help="fp32, fp16 or bf16 (default: the fastest that is safe)")
    parser.add_argument("--format", default="dicom", metavar="A,B,...", help="dicom, nrrd, png, npz (default: dicom)")
    parser.add_argument("--overwrite", action="store_true", help="replace images generated earlier")


def _add_reconstruct(commands: Any) -> None:
    text = "Reconstruct a CT from little. Research use only."
    tasks = commands.add_parser("reconstruct", help=text, description=text)
    tasks = tasks.add_subparsers(title="tasks", required=True, metavar="TASK")
    _add_sparse_view(tasks)
    _add_low_dose(tasks)
    _add_super_resolution(tasks)


def _reconstruction(tasks: Any, name: str, run: Callable[..., int], text: str, source: str) -> argparse.ArgumentParser:
    """A task of ``reconstruct`` with the options that all have."""
    parser = _command(tasks, name, run, text)
    parser.add_argument("input", type=Path, metavar="IN", help=source)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder for the result")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same image")
    parser.add_argument(
        "--slices", default="", metavar="FROM:TO[:STEP]", help="to try it on a part; from 1 at the feet (default: all)"
    )
    parser.add_argument("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="default: the fastest")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")
    return parser


def _add_sparse_view(tasks: Any) -> None:
    text = "Reconstruct a CT from few views, measured or simulated from a full CT."
    source = "projections (.npy, .npz, .nrrd, DICOM-CT-PD folder), or a CT to scan with few views"
    parser = _reconstruction(tasks, "sparse-view", _sparse_view, text, source)
    parser.add_argument("--tier", choices=["preview", "fast", "best"], default="fast", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=4, help="draws of the best tier (default: %(default)s)")
    parser.add_argument("--views", type=int, help="of the scan (default: 16 of a CT, all of measured projections)")
    parser.add_argument("--dose", type=float, help="of a simulated scan, of 100,000 photons a ray (default: no noise)")
    parser.add_argument("--size", type=int, help="pixels of a side (default: the CT's; 256 or 512 of projections)")
    parser.add_argument("--pixel-mm", type=float, help="of projections' images (default: what the detector covers)")
    parser.add_argument("--field-mm", type=float, help="side of projections' images, instead of --pixel-mm")
    parser.add_argument("--truncated", action="store_true", help="let the detector see less than the image")


def _add_low_dose(tasks: Any) -> None:
    text = "Take the noise out of a low-dose CT."
    parser = _reconstruction(tasks, "low-dose", _low_dose, text, "DICOM folder, NIfTI, NRRD or MHA file")
    parser.add_argument("--tier", choices=["fast", "best"], default="fast", help="default: %(default)s")
    parser.add_argument("--strength", type=float, default=1.0, help="0 changes nothing, 1 most (default: %(default)s)")
    parser.add_argument("--kept-mm", type=float, help="leave what is coarser (default: 5); 0 takes noise of any size")
    parser.add_argument("--noise-hu", type=float, help="standard deviation in soft tissue (default: told by the CT)")
    parser.add_argument("--dose", type=float, help="share of the full dose, if that is known instead")
    parser.add_argument("--simulate", type=float, metavar="DOSE", help="add a dose's noise first, and compare")


def _add_super_resolution(tasks: Any) -> None:
    text = "Make pixels finer, or slices thinner, so that they agree exactly with the CT."
    parser = _reconstruction(
        tasks, "super-resolution", _super_resolution, text, "DICOM folder, NIfTI, NRRD or MHA file"
    )
    parser.add_argument("--factor", type=int, default=4, help="2 to 8 times finer (default: %(default)s)")
    parser.add_argument("--direction", choices=["in-plane", "slices"], default="in-plane", help="default: %(default)s")
    parser.add_argument("--method", choices=["cubic", "null-space"], default="null-space", help="default: %(default)s")
    parser.add_argument("--thickness-mm", type=float, help="of the CT's slices (default: as its header says)")
    parser.add_argument("--samples", type=int, default=4, help="draws of the null-space method (default: %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="make the CT coarse first, and compare")


def _add_doctor(commands: Any) -> None:
    _command(commands, "doctor", _doctor, "Show hardware, weights, what will run where, and how long it will take.")


def _add_weights(commands: Any) -> None:
    parser = _command(commands, "weights", _weights, "List the weights, show a card, verify the checksums.")
    parser.add_argument("action", choices=["list", "show", "verify"], nargs="?", default="list")
    parser.add_argument("name", nargs="?", help="name of a weight (default: all)")


def _add_worker(commands: Any) -> None:
    text = "Serve a panel or a program: JSON requests on standard input, events on standard output."
    commands.add_parser("worker", help=text, description=text).set_defaults(run=_worker, jsonl=False)


def _options(arguments: argparse.Namespace) -> CaseOptions:
    return CaseOptions(
        arguments.device,
        arguments.quality,
        _listed(arguments.format),
        arguments.weights_folder,
        _listed(arguments.structures),
        arguments.triangles,
        arguments.frame,
        arguments.single_file,
    )


def _listed(text: str) -> tuple[str, ...]:
    """The parts of a text with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _segment_lungs(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    if arguments.batch:
        return _segment_batch(arguments, console, engine)
    engine, progress = engine or real_engine(), console.progress()
    record, _ = run_case(arguments.input, arguments.output, _options(arguments), engine, progress, arguments.overwrite)
    _tell_result(arguments.output, record, console)
    return ExitCode.DONE


def _segment_batch(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.batch import SUMMARY, Status, find_studies, run_batch

    studies = find_studies(arguments.input, arguments.output)
    failed = 0
    outcomes = run_batch(
        studies,
        arguments.output,
        _options(arguments),
        engine or real_engine(),
        lambda number, study: console.progress(f"[{number}/{len(studies)}] {study.name}: "),
        arguments.overwrite,
    )
    for outcome in outcomes:
        folder = arguments.output / outcome.study.name
        if outcome.status is Status.FAILED:
            failed += 1
            console.event("failed", case=outcome.study.name, message=outcome.message)
            console.note(f"{outcome.study.name}: failed: {outcome.message}")
        else:
            console.result(folder, case=outcome.study.name, status=outcome.status.value)
    console.note(f"{len(studies) - failed} of {len(studies)} studies have a result; see {arguments.output / SUMMARY}")
    return ExitCode.FAILED if failed else ExitCode.DONE


def _demo(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib import demo

    output, cache = arguments.output or demo.OUTPUT, demo.cache_folder()
    if not (cache / demo.CASE).is_dir():
        console.note("Fetching the demo's CT (35 MB, once) ...")
    case = demo.fetch_case(cache)
    engine, progress = engine or real_engine(), console.progress()
    record, result = run_case(case.ct, output, _options(arguments), engine, progress, overwrite=True, name=demo.CASE)
    rows = demo.compare_case(result, case)
    console.event("agreement", rows=[asdict(row) for row in rows], note=demo.NO_TRUTH)
    console.text(f"{demo.volume_table(record)}\n\n{demo.agreement_table(rows)}\n\n{demo.ATTRIBUTION}\n")
    for path, what in demo.things_to_look_at(output):
        console.text(f"{what:<28}{path}")
    _tell_result(output, record, console)
    return ExitCode.DONE


def _generate(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.export.synthetic import SyntheticImages, check_target, formats_of, write_synthetic
    from LCTfoundLib.tasks.generation import generate_images

    formats, request = formats_of(_listed(arguments.format)), _generation_request(arguments)
    check_target(arguments.output, arguments.overwrite)
    generating, writing = console.progress().split({"Generating": 97, "Writing": 3})
    result = generate_images(request, generating)
    window = result.window
    images = SyntheticImages(result.hu, window.width, window.level, result.absolute, result.provenance)
    files = write_synthetic(images, arguments.output, formats, arguments.overwrite, writing)
    console.note(f"{request.count} synthetic images in {result.provenance['seconds']:.0f} s; not of any patient.")
    console.result(arguments.output, files=[file.name for file in files], provenance=result.provenance)
    return ExitCode.DONE


def _generation_request(arguments: argparse.Namespace) -> GenerationRequest:
    from LCTfoundLib.networks.conditions import Language
    from LCTfoundLib.networks.foundation import STUDENT_WEIGHT
    from LCTfoundLib.tasks.generation import GenerationRequest, diseases_of, sampler_of, window_of

    return GenerationRequest(
        window=window_of(arguments.window),
        diseases=diseases_of(arguments.condition),
        count=arguments.count,
        size=arguments.size,
        sampler=sampler_of(arguments.sampler),
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        backbone=arguments.backbone or STUDENT_WEIGHT,
        weights_folder=arguments.weights_folder,
        language_model=arguments.language_model,
        language=Language(arguments.language),
        device=arguments.device,
        precision=arguments.precision,
    )


def _sparse_view(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.reconstruction_case import SliceChoice, SparseViewOptions, sparse_view_case
    from LCTfoundLib.tasks.sparse_view import SparseViewRequest, Tier

    request = SparseViewRequest(
        tier=Tier(arguments.tier),
        samples=arguments.samples,
        seed=arguments.seed,
        device=arguments.device,
        weights_folder=arguments.weights_folder,
        truncated=arguments.truncated,
    )
    options = SparseViewOptions(
        request,
        arguments.views,
        arguments.dose,
        arguments.size,
        arguments.pixel_mm,
        arguments.field_mm,
        SliceChoice.parse(arguments.slices),
    )
    return _reconstruct(arguments, console, sparse_view_case(options))


def _low_dose(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.reconstruction_case import LowDoseOptions, SliceChoice, low_dose_case
    from LCTfoundLib.tasks.low_dose import KEPT_MM, LowDoseRequest, LowDoseTier

    request = LowDoseRequest(
        tier=LowDoseTier(arguments.tier),
        strength=arguments.strength,
        kept_mm=KEPT_MM if arguments.kept_mm is None else arguments.kept_mm,
        sigma_hu=arguments.noise_hu,
        dose=arguments.dose,
        device=arguments.device,
        weights_folder=arguments.weights_folder,
    )
    options = LowDoseOptions(request, arguments.simulate, arguments.seed, SliceChoice.parse(arguments.slices))
    return _reconstruct(arguments, console, low_dose_case(options))


def _super_resolution(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.reconstruction_case import SliceChoice, SuperResolutionOptions, super_resolution_case
    from LCTfoundLib.tasks.super_resolution import Direction, Method, SuperResolutionRequest

    request = SuperResolutionRequest(
        direction=Direction(arguments.direction),
        factor=arguments.factor,
        method=Method(arguments.method),
        thickness_mm=arguments.thickness_mm,
        samples=arguments.samples,
        seed=arguments.seed,
        device=arguments.device,
        weights_folder=arguments.weights_folder,
    )
    options = SuperResolutionOptions(request, arguments.simulate, SliceChoice.parse(arguments.slices))
    return _reconstruct(arguments, console, super_resolution_case(options))


def _reconstruct(arguments: argparse.Namespace, console: Console, make: Callable[..., Any]) -> int:
    """Run a task of ``reconstruct`` and tell what came of it."""
    from LCTfoundLib.reconstruction_case import run_reconstruction, told_agreement

    manifest = run_reconstruction(arguments.input, arguments.output, make, console.progress(), arguments.overwrite)
    for text in manifest["notes"]:
        console.note(f"Note: {text}")
    for text in told_agreement(manifest):
        console.note(text)
    console.note(f"{manifest['notice']}. {manifest['intended_use']}")
    console.result(
        arguments.output,
        files=[entry["path"] for entry in manifest["files"] if not entry["path"].startswith("dicom/")],
        **{key: manifest[key] for key in ("synthetic", "agreement", "residual", "warnings", "notes", "provenance")},
    )
    return ExitCode.DONE


def _doctor(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.doctor import Verdict, checks_table, examine

    checks = examine(Path.cwd(), arguments.weights_folder)
    for check in checks:
        console.event("check", what=check.what, value=check.value, verdict=check.verdict.value)
    console.text(checks_table(checks))
    problems = sum(check.verdict is Verdict.PROBLEM for check in checks)
    if problems:
        console.error(f"{problems} of the checks found a problem (marked X).")
    return ExitCode.USER_ERROR if problems else ExitCode.DONE


def _weights(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.doctor import weights_table
    from LCTfoundLib.errors import WeightError
    from LCTfoundLib.weights.registry import list_weights, search_folders, verify

    folders = search_folders(arguments.weights_folder)
    entries = [entry for entry in list_weights(folders) if arguments.name in (None, entry.name)]
    if not entries:
        wanted = f"weight '{arguments.name}'" if arguments.name else "weight"
        raise WeightError(
            f"There is no {wanted} in {', '.join(map(str, folders)) or 'any folder'}; see `weights list`."
        )
    problems = {entry.name: verify(entry) if arguments.action == "verify" else entry.problem for entry in entries}
    if arguments.action == "list":
        console.text(weights_table(entries))
    for entry in entries:
        problem, card = problems[entry.name], json.loads(entry.card.to_json()) if entry.card else None
        console.event("weight", name=entry.name, path=str(entry.path), problem=problem, card=card)
        if arguments.action == "show":
            console.text(problem or json.dumps(card, indent=2, ensure_ascii=False))
        elif arguments.action == "verify":
            console.text(f"{entry.name}: {problem or 'as its card says'}")
    return ExitCode.USER_ERROR if any(problems.values()) else ExitCode.DONE


def _worker(arguments: argparse.Namespace, console: Console, engine: Engine | None) -> int:
    from LCTfoundLib.worker import main as serve

    return serve()


def _tell_result(folder: Path, record: CaseRecord, console: Console) -> None:
    for finding in record.findings:
        console.note(f"Note: {finding}")
    console.note(f"Done in {record.seconds['total']:.0f} s, peak memory {record.peak_memory_mb / 1000:.1f} GB.")
    console.result(folder, seconds=record.seconds, peak_memory_mb=record.peak_memory_mb, findings=record.findings)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
