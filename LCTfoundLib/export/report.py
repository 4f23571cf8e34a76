"""The report: one HTML file a surgeon opens, prints or mails, with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from string import Template
from typing import Any

from PIL import Image

from LCTfoundLib import __version__
from LCTfoundLib.anatomy.structures import STRUCTURES
from LCTfoundLib.export.options import Frame
from LCTfoundLib.export.slices import Picture
from LCTfoundLib.export.surfaces import MeshReport
from LCTfoundLib.export.tables import VolumeRow

__all__ = ["ReportContent", "render_report"]

_COLORS = {s.key: s.color for s in STRUCTURES}
_NAMES = {s.key: s.name for s in STRUCTURES}
#: Words of severity -> (style, heading); anything else is a note.
_SEVERITIES = {
    **dict.fromkeys(("error", "critical", "severe", "fail", "failure", "high"), ("bad", "Problem")),
    **dict.fromkeys(("warning", "warn", "caution", "medium"), ("warn", "Check")),
}


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
        style=_STYLE,
        case=escape(content.case),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=escape(__version__),
        image="".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in content.image.items()),
        summary=_summary(content.rows),
        findings=_findings(content.findings),
        renderings=_renderings(content),
        slices="".join(_slice_row(heading, pictures) for heading, pictures in content.slices.items()),
        table=_table(content.rows),
        surfaces=_surfaces(content.meshes, content.frame),
        provenance=_provenance(content.provenance),
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
    return "".join(_finding(finding) for finding in findings)


def _finding(finding: Any) -> str:
    severity = getattr(finding, "severity", "")
    word = str(getattr(severity, "value", severity)).lower()
    style, heading = _SEVERITIES.get(word, ("note", "Note"))
    structure = str(getattr(finding, "structure", "") or "")
    place = f" &middot; {escape(_NAMES.get(structure, structure))}" if structure else ""
    return f'<li class="{style}"><b>{heading}{place}</b> {escape(str(getattr(finding, "sentence", finding)))}</li>'


def _renderings(content: ReportContent) -> str:
    if not content.renderings:
        return "<p>No 3D picture: there is no surface to show.</p>"
    styles = ["wide", "half", "half"] + [""] * len(content.renderings)
    figures = [_figure(p, style) for p, style in zip(content.renderings, styles, strict=False)]
    return f'<div class="models">{"".join(figures)}</div><p class="fine">Drawn by {escape(content.renderer)}.</p>'


def _slice_row(heading: str, pictures: Sequence[Picture]) -> str:
    columns = "four" if len(pictures) == 4 else "three"
    return f'<h3>{escape(heading)}</h3><div class="slices {columns}">{"".join(_figure(p) for p in pictures)}</div>'


def _figure(picture: Picture, style: str = "") -> str:
    caption = escape(picture.caption)
    kind = f' class="{style}"' if style else ""
    return (
        f'<figure{kind}><img src="{_data_uri(picture.image)}" alt="{caption}" width="{picture.image.width}" '
        f'height="{picture.image.height}"><figcaption>{caption}</figcaption></figure>'
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=86, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


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


def _provenance(provenance: Mapping[str, Any]) -> str:
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in _flat(provenance)]
    return "".join(lines) or "<tr><td>Nothing was recorded.</td></tr>"


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (path, text) lines."""
    if isinstance(value, Mapping):
        return [line for k, v in value.items() for line in _flat(v, f"{name} \u203a {k}" if name else str(k))]
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(v) for v in value)
    return [(name, str(getattr(value, "value", value)))]


_STYLE = """
:root{--ink:#1b2430;--soft:#5b6776;--line:#dfe4ea;--paper:#fff;--wash:#f5f7f9;--brand:#0b5d7a}
*{box-sizing:border-box}
body{margin:0;background:#eceff2;color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;background:var(--paper);padding:0 40px 40px}
header{padding:32px 0 18px;border-bottom:3px solid var(--brand);display:flex;flex-wrap:wrap;gap:8px 32px;
 align-items:flex-end;justify-content:space-between}
h1{margin:0;font-size:27px;letter-spacing:-.01em;overflow-wrap:anywhere}
h1 small{display:block;font-size:14px;font-weight:600;color:var(--brand);letter-spacing:.04em}
header p{margin:0;color:var(--soft);text-align:right;font-size:13.5px}
.use{margin:18px 0;padding:10px 16px;border:1px solid #d9a441;background:#fff8e8;border-radius:6px;font-weight:600}
.image{display:flex;flex-wrap:wrap;gap:4px 22px;color:var(--soft);font-size:13.5px}.image b{color:var(--ink)}
h2{margin:36px 0 12px;font-size:19px;border-bottom:1px solid var(--line);padding-bottom:5px}
h3{margin:20px 0 8px;font-size:14.5px;color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:10px}
.tiles div{background:var(--wash);border-radius:6px;padding:10px 12px;font-size:12.5px;color:var(--soft);
 line-height:1.35}
.tiles b{display:block;font-size:20px;color:var(--ink)}.tiles small{display:block}
.flags{list-style:none;padding:0;margin:0;display:grid;gap:8px}
.flags li{padding:9px 14px;border-left:5px solid;border-radius:4px;overflow-wrap:anywhere}.flags b{margin-right:6px}
.flags .bad{background:#fdecec;border-color:#c62828}.flags .warn{background:#fff5e0;border-color:#e69500}
.flags .note{background:#eaf3fb;border-color:#2b7bbb}.flags .good{background:#eaf6ec;border-color:#2e8b46}
figure{margin:0;break-inside:avoid}figure img{display:block;width:100%;height:auto;border-radius:5px}
figcaption{font-size:12.5px;color:var(--soft);padding:4px 2px}
.models{display:grid;grid-template-columns:repeat(12,1fr);gap:14px}.models img{border:1px solid var(--line)}
.models figure{grid-column:span 3}.models .half{grid-column:span 4}.models .wide{grid-column:1/9;grid-row:1/3}
.slices{display:grid;gap:12px;align-items:start}.three{grid-template-columns:repeat(3,1fr)}
.four{grid-template-columns:repeat(4,1fr)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--soft)}
i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:8px;vertical-align:-1px}
table{width:100%;border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:400}td{text-align:right}thead th{color:var(--soft);font-size:12.5px;text-align:right}
thead th:first-child{text-align:left}
.volumes th,.volumes td{padding:4px 8px;border-bottom:1px solid var(--line);white-space:nowrap}
.volumes .group th,.volumes .group td{font-weight:650;background:var(--wash);border-top:1px solid var(--line)}
.volumes tr{break-inside:avoid}em{color:#c62828;font-style:normal;font-weight:600}
.bar{display:inline-block;width:96px;height:9px;border-radius:5px;background:#e7ebef;overflow:hidden;
 vertical-align:0;margin-right:8px;text-align:left}
.bar span{display:block;height:100%;border-radius:5px}.share span{background:#8aa4b8}.trust span{background:#2e8b8b}
.source th{width:34%;color:var(--soft);vertical-align:top}.source td{text-align:left;overflow-wrap:anywhere}
.source th,.source td{padding:3px 8px 3px 0;border-bottom:1px solid var(--line)}
.fine,footer{color:var(--soft);font-size:12.5px}
footer{margin-top:32px;border-top:1px solid var(--line);padding-top:10px}
@media (max-width:760px){main{padding:0 16px 24px}.slices{grid-template-columns:1fr 1fr}.bar{width:48px}
 .models figure,.models .half{grid-column:span 6}.models .wide{grid-column:1/13;grid-row:auto}}
@media print{@page{size:A4;margin:12mm}body{background:#fff;font-size:11px}main{max-width:none;padding:0}
 h2{break-after:avoid}h3{break-after:avoid}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""

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
