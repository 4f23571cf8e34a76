"""What the reports share: style, flags, pictures within the page, and where a result comes from."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from LCTfoundLib.export.slices import Picture

__all__ = ["STYLE", "figure", "finding_line", "picture_row", "provenance_rows"]

#: Words of severity -> (style, heading); anything else is a note.
_SEVERITIES = {
    **dict.fromkeys(("error", "critical", "severe", "fail", "failure", "high"), ("bad", "Problem")),
    **dict.fromkeys(("warning", "warn", "caution", "medium"), ("warn", "Check")),
}


def finding_line(finding: Any, place: str = "") -> str:
    """A finding (its ``severity`` and ``sentence``, or a plain sentence) as a line of a list with colored edges."""
    severity = getattr(finding, "severity", "")
    word = str(getattr(severity, "value", severity)).lower()
    style, heading = _SEVERITIES.get(word, ("note", "Note"))
    where = f" &middot; {escape(place)}" if place else ""
    return f'<li class="{style}"><b>{heading}{where}</b> {escape(str(getattr(finding, "sentence", finding)))}</li>'


def picture_row(heading: str, pictures: Sequence[Picture]) -> str:
    """Pictures side by side under a heading."""
    columns = {4: "four", 5: "five"}.get(len(pictures), "three")
    return f'<h3>{escape(heading)}</h3><div class="slices {columns}">{"".join(figure(p) for p in pictures)}</div>'


def figure(picture: Picture, style: str = "") -> str:
    """A picture with its caption."""
    caption = escape(picture.caption)
    kind = f' class="{style}"' if style else ""
    return (
        f'<figure{kind}><img src="{_data_uri(picture.image)}" alt="{caption}" width="{picture.image.width}" '
        f'height="{picture.image.height}"><figcaption>{caption}</figcaption></figure>'
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    # Not "optimize": Pillow then has one byte a pixel for the result, which colored noise exceeds.
    image.convert("RGB").save(buffer, "JPEG", quality=86, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def provenance_rows(provenance: Mapping[str, Any]) -> str:
    """Nested mappings as the rows of a table."""
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in _flat(provenance)]
    return "".join(lines) or "<tr><td>Nothing was recorded.</td></tr>"


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (path, text) lines."""
    if isinstance(value, Mapping):
        return [line for k, v in value.items() for line in _flat(v, f"{name} \u203a {k}" if name else str(k))]
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(v) for v in value)
    return [(name, str(getattr(value, "value", value)))]


STYLE = """
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
.four{grid-template-columns:repeat(4,1fr)}.five{grid-template-columns:repeat(5,1fr)}
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
