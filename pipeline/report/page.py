"""Building blocks of HTML reports. A page is one self-contained file: it embeds its pictures and loads nothing.

On a phone, tables and listings scroll inside their own box. In print they shrink, and no picture is split.
"""

import base64
import html
from collections.abc import Collection, Sequence

from pipeline import tracking

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #222;
  background: #fff; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
h1, h2, h3, h2 + p { break-after: avoid }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { vertical-align: bottom; border-bottom: 2px solid #888 }
td.text, th.text { text-align: left }
td.long { white-space: normal; min-width: 16rem }
tr.marked td { background: #eef4fb; font-weight: 600 }
tr { break-inside: avoid } thead { display: table-header-group }
.lead { font-size: 1.1rem }
.note { color: #555; font-size: .9rem }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: 1rem 0; break-inside: avoid } figcaption { font-size: .9rem; color: #555 }
.pictures figure { margin: 0 }
img { max-width: 100%; height: auto; display: block }
.wide { overflow-x: auto } .wide img { min-width: 40rem }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem }
@page { size: A4; margin: 14mm }
@page landscape { size: A4 landscape; margin: 12mm }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0 }
  .scroll { overflow: visible }
  .landscape { page: landscape }
  table { font-size: min(8pt, 100pt / var(--columns)) } .landscape table { font-size: min(8pt, 135pt / var(--columns)) }
  th, td { padding: .3em .5em; white-space: normal; overflow-wrap: normal }
  td:first-child { white-space: nowrap } th:first-child, td:first-child { padding-left: 0 }
  td.long { min-width: 0 }
  tr.marked td { background: none; border-bottom: 1px solid #333 }
  .pictures { grid-template-columns: 1fr 1fr }
  .wide img { min-width: 0 }
  pre { white-space: pre-wrap; background: none; border: 1px solid #ccc; font-size: 8pt }
}
"""


def page(title: str, parts: Sequence[str]) -> bytes:
    """The content of the HTML file.

    Args:
        parts: HTML, from top to bottom.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'.encode()


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(*lines: str, kind: str = "") -> str:
    """A paragraph, with a line break after each line."""
    return f"<p{_class(kind)}>{'<br>'.join(map(html.escape, lines))}</p>"


def mlflow_command(uri: str) -> str:
    """A command or a hint for viewing the runs."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}"
    return f"open {tracking.without_password(uri)} in a browser"


def listing(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{html.escape(text)}</pre>"


def landscape(parts: Sequence[str]) -> str:
    """Parts that are printed on landscape pages of their own."""
    return f'<section class="landscape">{"".join(parts)}</section>'


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int] = (0,), marked: Collection[int] = ()
) -> str:
    """A table that scrolls inside its own box.

    Args:
        texts: columns of text, aligned left; the other columns are numbers, aligned right.
        marked: highlighted rows.
    """
    top = "".join(f"<th{_class('text' if n in texts else '')}>{html.escape(cell)}</th>" for n, cell in enumerate(heads))
    lines = [
        f"<tr{_class('marked' if number in marked else '')}>"
        + "".join(f"<td{_class(_cell_class(n in texts, cell))}>{html.escape(cell)}</td>" for n, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    ]
    box = f'<div class="scroll" style="--columns: {len(heads)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"


LONG_TEXT = 48
"""Cells with more characters may wrap."""


def _cell_class(is_text: bool, cell: str) -> str:
    return " ".join([*(["text"] if is_text else []), *(["long"] if is_text and len(cell) > LONG_TEXT else [])])


def picture(png: bytes, alt: str, caption: str = "", is_wide: bool = False) -> str:
    """An embedded picture. ``alt`` describes it to screen readers; a wide picture scrolls on a phone."""
    data = base64.b64encode(png).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure{_class('wide' if is_wide else '')}>{image}{below}</figure>"


def pictures(parts: Sequence[str]) -> str:
    """A grid of pictures, with as many columns as fit."""
    return f'<div class="pictures">{"".join(parts)}</div>'


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
