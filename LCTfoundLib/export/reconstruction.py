"""The result folder of a reconstruction: image, uncertainty, DICOM series, report, and a manifest; all or nothing.

==================== ==================================================================================
``reconstruction.nrrd`` HU, whole ones
``uncertainty.nrrd``    half of the width of the 90 % interval of each voxel, HU; if the method tells one
``dicom/``              the image as a derived series of the source's study
``report.html``         warnings, numbers, pictures; loads nothing from elsewhere
``overview.png``        the same pictures in one
``manifest.json``       how it came about, numbers, and checksums of all files
==================== ==================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from LCTfoundLib import __version__
from LCTfoundLib.anatomy.agreement import RANGE_HU, Agreement
from LCTfoundLib.export.derived_series import DicomSource, Marks, write_derived_series
from LCTfoundLib.export.manifest import jsonable
from LCTfoundLib.export.marking import PRODUCT, USE, Nature, marked
from LCTfoundLib.export.nrrd import write_nrrd
from LCTfoundLib.export.output_folder import MANIFEST, file_entries, output_folder
from LCTfoundLib.export.page import STYLE, figure, finding_line, picture_row, provenance_rows
from LCTfoundLib.export.reconstruction_pictures import (
    LUNG,
    SOFT_TISSUE,
    Curves,
    ReconstructionPainter,
    Window,
    residual_plot,
    side_by_side,
)
from LCTfoundLib.export.slices import Picture
from LCTfoundLib.runtime.progress import Progress
from LCTfoundLib.volume import Volume

__all__ = ["KIND", "Reconstruction", "write_reconstruction"]

#: What the manifest says the folder is.
KIND = "reconstruction"
_SHARES = {"Writing the image": 3, "Writing the DICOM series": 5, "Drawing the report": 2}


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What to write; all volumes lie on one grid.

    Attributes:
        case: its name, for the report.
        task: such as "sparse-view reconstruction".
        how: the method in some words, such as "fast, 16 views".
        image: HU.
        before: what there was without the method, HU.
        before_name: what that is.
        nature: what the image is.
        interval: half of the width of the 90 % interval, HU.
        reference: what it should be, HU.
        reference_name: what that is.
        residual: share of the measurements that each slice leaves unexplained, (N,).
        numbers: of the slices in the input, (N,).
        agreement: with the reference, by the name of the image that was compared.
        warnings: sentences to read first.
        notes: sentences to read, too.
        curves: plots of the report, beside that of the residual.
        facts: lines for the report's head.
        provenance: how it came about.
        source: DICOM files that it was computed from.
    """

    case: str
    task: str
    how: str
    image: Volume
    before: Volume
    before_name: str
    nature: Nature
    interval: Volume | None = None
    reference: Volume | None = None
    reference_name: str = "Full CT"
    residual: np.ndarray | None = None
    numbers: Sequence[int] = ()
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    curves: Sequence[Curves] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    source: DicomSource = field(default_factory=DicomSource)

    @property
    def notice(self) -> str:
        """What every file says."""
        return f"{self.nature.upper()} - {self.task} by {PRODUCT}, not a scanner's image"

    @property
    def summary(self) -> str:
        """How it was made, in a line: task, method, weights."""
        weights = [f"{name} {card['version']} (sha256 {card['sha256']})" for name, card in self._weights().items()]
        return "; ".join([self.task, self.how, f"weights: {', '.join(weights) or 'none'}"])

    @property
    def marks(self) -> Marks:
        return Marks(
            f"{PRODUCT} {self.how} ({self.nature}; research use)",
            f"{PRODUCT} {__version__}: {self.summary}; {self.nature}; research use",
            self.nature,
        )

    def told(self) -> dict[str, Any]:
        """What the manifest and each NRRD file tell."""
        return {
            "product": PRODUCT,
            "version": __version__,
            "kind": KIND,
            "notice": self.notice,
            "synthetic": self.nature.synthetic,
            "intended_use": USE,
            "case": self.case,
            "task": self.task,
            "how": self.how,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "agreement": jsonable({name: asdict(found) for name, found in self.agreement.items()}),
            "agreement_range_hu": RANGE_HU if self.agreement else None,
            "slices": list(self.numbers),
            "residual": None if self.residual is None else [round(float(share), 6) for share in self.residual],
            "provenance": jsonable(dict(self.provenance)),
        }

    def _weights(self) -> Mapping[str, Mapping[str, Any]]:
        return self.provenance.get("weights") or {}


def write_reconstruction(content: Reconstruction, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write the folder.

    Args:
        content: what to write.
        folder: must not exist, be empty, or hold an earlier result, which is replaced; see ``output_folder``.
        progress: told after each file; stops the writing when cancelled.

    Returns:
        The manifest.

    Raises:
        OutputError: the place cannot be written, is full, or files of others are in the way.
        Cancelled: the user stopped; the folder is as it was.
    """
    imaging, series, drawing = Progress.of(progress).split(_SHARES)
    with output_folder(folder) as stage:
        imaging.update(0.0)
        told = content.told()
        _write_volume(content, content.image, told, "HU", stage / "reconstruction.nrrd")
        if content.interval is not None:
            imaging.update(0.6)
            meaning = "half of the width of the 90 % interval, HU"
            _write_volume(content, content.interval, told, meaning, stage / "uncertainty.nrrd")
        (stage / "dicom").mkdir()
        write_derived_series(content.image, stage / "dicom", content.marks, content.source, series)
        drawing.update(0.0)
        painted = _Painted(content)
        painted.overview().save(stage / "overview.png")
        drawing.update(0.5)
        (stage / "report.html").write_text(_report(content, painted), encoding="utf-8")
        created = datetime.now().astimezone().isoformat(timespec="seconds")
        manifest = told | {"complete": True, "created": created, "files": file_entries(stage)}
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        (stage / MANIFEST).write_text(text, encoding="utf-8")
        drawing.update(0.99)  # the last moment to stop: after it the files take their place
    drawing.done()
    return manifest


def _write_volume(content: Reconstruction, volume: Volume, told: Mapping[str, Any], meaning: str, path: Path) -> None:
    values = np.clip(np.rint(volume.array), -32768, 32767).astype(np.int16)
    pairs = marked(content.notice, content.summary, told, content.nature.synthetic) | {"Values": meaning}
    write_nrrd(values, pairs, path, volume)


# -- pictures --------------------------------------------------------------------------------------------------------


class _Painted:
    """The pictures of a reconstruction, row by row."""

    def __init__(self, content: Reconstruction) -> None:
        self._content = content
        self._painter = ReconstructionPainter(content.image, f"{content.nature.upper()}: RESEARCH USE")
        levels = self._painter.levels()
        middle = levels[len(levels) // 2]
        self.rows = {self._heading(k, LUNG): self._row(k, LUNG) for k in levels}
        self.rows[self._heading(middle, SOFT_TISSUE)] = self._row(middle, SOFT_TISSUE)

    def overview(self) -> Any:
        """All of them in one picture."""
        content = self._content
        return side_by_side(self.rows, [f"{content.notice}. {USE}", f"{content.case}: {content.how}"])

    def _heading(self, k: int, window: Window) -> str:
        number = f"Slice {self._content.numbers[k]}, " if len(self._content.numbers) else ""
        return f"{number}{self._painter.position(k)}, {window.name}"

    def _row(self, k: int, window: Window) -> list[Picture]:
        content, paint = self._content, self._painter
        row = []
        if content.reference is not None:
            row.append(paint.gray(content.reference, k, window, f"{content.reference_name} (reference)"))
        row.append(paint.gray(content.before, k, window, content.before_name))
        row.append(paint.gray(content.image, k, window, "Reconstruction", marked=True))
        if window is not LUNG:  # maps do not depend on the window
            return row
        other = content.before if content.reference is None else content.reference
        what = "What the method changed" if content.reference is None else "Reconstruction minus reference"
        row.append(paint.difference(content.image, other, k, what))
        if content.interval is not None:
            row.append(paint.expected_error(content.interval, k, "Expected error (90 %: \N{PLUS-MINUS SIGN})"))
        return row


# -- report ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A sentence with how serious it is."""

    sentence: str
    severity: str


def _report(content: Reconstruction, painted: _Painted) -> str:
    """The whole HTML document; every text from outside is escaped."""
    lines = [_Line(text, "warning") for text in content.warnings] + [_Line(text, "note") for text in content.notes]
    return _PAGE.substitute(
        style=STYLE,
        title=escape(content.task),
        heading=escape(content.task.upper()),
        case=escape(content.case),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=escape(__version__),
        mark=content.nature.upper(),
        notice=escape(f"{content.notice}. {USE}"),
        facts="".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in content.facts.items()),
        warnings="".join(finding_line(line) for line in lines),
        agreement=_agreement(content),
        residual=_residual(content),
        pictures="".join(picture_row(heading, row) for heading, row in painted.rows.items()),
        provenance=provenance_rows(content.provenance),
    )


def _agreement(content: Reconstruction) -> str:
    if not content.agreement:
        return "<p>There is no reference: how near this image is to the truth is not known.</p>"
    told = any(found.covered is not None for found in content.agreement.values())
    rows = "".join(_agreement_row(name, found, told) for name, found in content.agreement.items())
    heading = "<th>truth within the 90 % interval</th>" if told else ""
    return (
        '<table class="volumes"><thead><tr><th>Image</th><th>PSNR, dB</th><th>SSIM</th><th>RMSE, HU</th>'
        f"{heading}</tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="fine">Reference: {escape(content.reference_name)}. Inside the body, over {RANGE_HU:,.0f} HU (-1000 '
        f"to 1000, clipped), mean of {next(iter(content.agreement.values())).slices} slices.</p>"
    )


def _agreement_row(name: str, found: Agreement, told: bool) -> str:
    ssim = "" if found.ssim is None else f"{found.ssim:.3f}"
    covered = "" if found.covered is None else f"{100 * found.covered:.0f} % of pixels"
    last = f"<td>{covered}</td>" if told else ""
    psnr = "same" if np.isinf(found.psnr) else f"{found.psnr:.1f}"
    return f"<tr><th>{escape(name)}</th><td>{psnr}</td><td>{ssim}</td><td>{found.rmse_hu:.0f}</td>{last}</tr>"


def _residual(content: Reconstruction) -> str:
    if content.residual is None:
        return "".join(f"<h2>What was done to the image</h2>{figure(curves.picture)}" for curves in content.curves)
    plot = residual_plot(content.residual, content.numbers or range(1, len(content.residual) + 1))
    text = f"What the image leaves unexplained: {100 * float(content.residual.mean()):.2g} % of the measurements"
    return (
        f"<h2>Agreement with the measurements</h2>{figure(Picture(plot, text))}"
        '<p class="fine">||Ax - y|| / ||y|| of each slice. A small value says that the image fits what was measured, '
        "not that it is right: many images fit few views.</p>"
    )


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$case - $title</title><style>$style
body::after{content:"$mark \\00b7 RESEARCH USE";position:fixed;inset:0;display:grid;place-items:center;
 font-size:6vw;font-weight:700;color:#b00020;opacity:.06;transform:rotate(-28deg);pointer-events:none}
</style></head><body><main>
<header><h1><small>LCTFOUND &middot; $heading</small>$case</h1><p>$date<br>version $version</p></header>
<p class="use">$notice</p>
<ul class="flags">$warnings</ul>
<p class="image">$facts</p>
<h2>How near to the truth</h2>$agreement
$residual
<h2>Slices</h2><p class="key">R, L: patient's right, left. Differences and expected errors have one scale, up to 200 HU;
black is none.</p>$pictures
<h2>Where this comes from</h2><table class="source"><tbody>$provenance</tbody></table>
<footer>The expected error is the method's own estimate. Checksums of all files are in manifest.json.</footer>
</main></body></html>
""")
