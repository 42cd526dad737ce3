"""Building blocks of HTML reports. A page is one self-contained file: it embeds its pictures and loads no other files.

On a phone, tables and listings scroll inside their own boxes. In print, they shrink, and no picture is split.
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

LONG_TEXT = 48
"""Maximum number of characters in a table cell whose text does not wrap."""


def page(title: str, parts: Sequence[str]) -> bytes:
    """The content of the HTML file.

    Args:
        parts: HTML elements from top to bottom.
    """
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'.encode()


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return _element(f"h{level}", html.escape(text))


def paragraph(*lines: str, kind: str = "") -> str:
    """A paragraph, with a line break after each line."""
    return _element("p", "<br>".join(map(html.escape, lines)), kind)


def mlflow_command(uri: str) -> str:
    """A command to view the runs in a database, or a hint to view the runs on a server."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {uri}"
    return f"open {tracking.without_password(uri)} in a browser"


def listing(text: str) -> str:
    """Preformatted text."""
    return _element("pre", html.escape(text))


def landscape(parts: Sequence[str]) -> str:
    """Parts that are printed on separate landscape pages."""
    return _element("section", "".join(parts), "landscape")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int] = (0,), marked: Collection[int] = ()
) -> str:
    """A table that scrolls inside its own box.

    Args:
        texts: indices of text columns, which are aligned left. The other columns have numbers, aligned right.
        marked: indices of highlighted rows.
    """

    def line(kind: str, cells: Sequence[str], classes: str = "") -> str:
        parts = []
        for number, text in enumerate(cells):
            is_long = len(text) > LONG_TEXT
            parts.append(_element(kind, html.escape(text), "text" + " long" * is_long if number in texts else ""))
        return _element("tr", "".join(parts), classes)

    body = "\n".join(line("td", row, "marked" if number in marked else "") for number, row in enumerate(rows))
    content = f"<table><thead>{line('th', heads)}</thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" style="--columns: {len(heads)}">{content}</div>'


def picture(png: bytes, alt: str, caption: str = "", is_wide: bool = False) -> str:
    """An embedded picture. ``alt`` describes it to screen readers; a wide picture scrolls on a phone."""
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    below = _element("figcaption", html.escape(caption)) if caption else ""
    return _element("figure", image + below, "wide" if is_wide else "")


def pictures(parts: Sequence[str]) -> str:
    """A grid of pictures, with as many columns as the page's width allows."""
    return _element("div", "".join(parts), "pictures")


def _element(kind: str, content: str, classes: str = "") -> str:
    attribute = f' class="{classes}"' if classes else ""
    return f"<{kind}{attribute}>{content}</{kind}>"
