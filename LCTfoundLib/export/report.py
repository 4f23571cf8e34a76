"""The report: one HTML file a surgeon opens, prints or mails, with nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from string import Template
from typing import Any

from LCTfoundLib import __version__
from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.export.options import Frame
from LCTfoundLib.export.page import STYLE, figure, finding_line, picture_row, provenance_rows
from LCTfoundLib.export.slices import Picture
from LCTfoundLib.export.surfaces import MeshReport
from LCTfoundLib.export.tables import VolumeRow

__all__ = ["ReportContent", "render_report"]

_COLORS = {s.key: s.color for s in STRUCTURES}
_NAMES = {s.key: s.name for s in STRUCTURES}


@dataclass(frozen=True)
class ReportContent:
    """What the report shows.

    Attributes:
        case: name of the case.
        rows: of the volumes table.
        findings: with severity, structure and sentence, most important first.
        renderings: 3D pictures; the first is shown large.
        slices: slice pictures by heading.
        provenance: nested mapping of how the result came about.
        renderer: who drew the 3D pictures.
        meshes: reports of the models by key.
        frame: of the models.
        image: lines about the CT (name -> value).
    """

    case: str
    rows: Sequence[VolumeRow]
    findings: Sequence[Any] = ()
    renderings: Sequence[Picture] = ()
    slices: Mapping[str, Sequence[Picture]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    renderer: str = ""
    meshes: Mapping[str, MeshReport] = field(default_factory=dict)
    frame: Frame = Frame.LPS
    image: Mapping[str, str] = field(default_factory=dict)


def render_report(content: ReportContent) -> str:
    """The whole HTML document; every text from outside is escaped."""
    return _PAGE.substitute(
        style=STYLE,
        case=escape(content.case),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=escape(__version__),
        image="".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in content.image.items()),
        summary=_summary(content.rows),
        findings=_findings(content.findings),
        renderings=_renderings(content),
        slices="".join(picture_row(heading, pictures) for heading, pictures in content.slices.items()),
        table=_table(content.rows),
        surfaces=_surfaces(content.meshes, content.frame),
        provenance=provenance_rows(content.provenance),
    )


def _summary(rows: Iterable[VolumeRow]) -> str:
    """Tiles with the lungs' volumes, then the lobes'."""
    shown = [r for kind in ("lung", "lobe") for r in rows if r.kind == kind]
    shown.sort(key=lambda r: r.key != "lungs")
    tiles = []
    for row in shown:
        share = f"{100 * row.share:.1f} %" if row.share is not None and row.key != "lungs" else "total"
        tiles.append(f"<div><b>{row.volume / 1000:.2f} L</b>{escape(row.name)}<small>{share}</small></div>")
    return "".join(tiles)


def _findings(findings: Sequence[Any]) -> str:
    if not findings:
        return '<li class="good"><b>No quality flag was raised.</b> This is not proof of a correct result.</li>'
    return "".join(finding_line(finding, _place(finding)) for finding in findings)


def _place(finding: Any) -> str:
    structure = str(getattr(finding, "structure", "") or "")
    return _NAMES.get(structure, structure)


def _renderings(content: ReportContent) -> str:
    if not content.renderings:
        return "<p>No 3D picture: there is no surface to show.</p>"
    styles = ["wide", "half", "half"] + [""] * len(content.renderings)
    figures = [figure(p, style) for p, style in zip(content.renderings, styles, strict=False)]
    return f'<div class="models">{"".join(figures)}</div><p class="fine">Drawn by {escape(content.renderer)}.</p>'


def _table(rows: Sequence[VolumeRow]) -> str:
    largest = max((r.share or 0 for r in rows if r.kind == "segment"), default=0) or 1
    parts = []
    for lobe in [r for r in rows if r.kind == "lobe"]:
        parts.append(_row(lobe, largest, heading=True))
        parts += [_row(r, largest) for r in rows if r.kind == "segment" and r.lobe == lobe.name]
    for kind, title in (("lung", "Lungs"), ("tree", "Trees (inside the segments and in the mediastinum)")):
        parts.append(f'<tr class="group"><th colspan="6">{title}</th></tr>')
        parts += [_row(r, largest) for r in rows if r.kind == kind]
    return "".join(parts)


def _row(row: VolumeRow, largest: float, heading: bool = False) -> str:
    color = _COLORS.get(row.key)
    swatch = f'<i style="background:rgb{color}"></i>' if color else "<i></i>"
    missing = "" if row.volume > 0 else " <em>not found</em>"
    share = bar = ""
    if row.share is not None:
        share = f"{100 * row.share:.1f} %"
        if row.kind == "segment":
            bar = _bar(row.share / largest, "share")
    confidence = "" if row.confidence is None else f"{_bar(row.confidence, 'trust')}{100 * row.confidence:.0f} %"
    mean = "" if row.mean_hu is None else f"{row.mean_hu:.0f}".replace("-", "&minus;")
    style = ' class="group"' if heading else ""
    return (
        f"<tr{style}><th>{swatch}{escape(row.name)}{missing}</th><td>{row.volume:.1f}</td><td>{share}</td>"
        f"<td>{bar}</td><td>{mean}</td><td>{confidence}</td></tr>"
    )


def _bar(share: float, style: str) -> str:
    return f'<span class="bar {style}"><span style="width:{100 * min(max(share, 0.0), 1.0):.0f}%"></span></span>'


def _surfaces(meshes: Mapping[str, MeshReport], frame: Frame) -> str:
    if not meshes:
        return ""
    closed = sum(report.watertight for report in meshes.values())
    worst = max(abs(report.volume_error) for report in meshes.values())
    triangles = sum(report.triangles for report in meshes.values())
    return (
        f"<p>{len(meshes)} surface{'' if len(meshes) == 1 else 's'} in {frame} millimeters, {triangles:,} triangles; "
        f"{closed} of {len(meshes)} watertight; the volume of a surface differs from its label by at most "
        f"{100 * worst:.2f} %.</p>"
    )


_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$case - lung segmentation</title><style>$style</style></head><body><main>
<header><h1><small>LCTFOUND &middot; LUNG SEGMENTATION</small>$case</h1><p>$date<br>version $version</p></header>
<p class="use">Research use only. Not a medical device: not for diagnosis or treatment decisions.</p>
<p class="image">$image</p>
<h2>What to look at first</h2><ul class="flags">$findings</ul>
<h2>Volumes at a glance</h2><div class="tiles">$summary</div>
<h2>3D models</h2>$renderings
<h2>Slices</h2><p class="key">Segments are tinted in the colors of the table and cut at their borders.
<span><i style="background:rgb(120,220,255)"></i>airway</span>
<span><i style="background:rgb(40,120,235)"></i>pulmonary artery</span>
<span><i style="background:rgb(235,60,60)"></i>pulmonary vein</span>
<span>R, L: patient's right, left</span><span>coordinates: LPS mm</span></p>$slices
<h2>All volumes</h2><table class="volumes"><thead><tr><th>Structure</th><th>mL</th><th>of lungs</th><th></th>
<th>mean HU</th><th>confidence</th></tr></thead><tbody>$table</tbody></table>
<h2>Where this comes from</h2>$surfaces<table class="source"><tbody>$provenance</tbody></table>
<footer>The segments tile the lungs; vessels and airways inside a segment count to its volume. Confidence is the
method's own estimate, not a measured accuracy. Checksums of all files are in manifest.json.</footer>
</main></body></html>
""")
