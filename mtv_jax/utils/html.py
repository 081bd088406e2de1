"""Parts of pages that need no other file: text, tables, pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def escape(text: Any) -> str:
  """Text for a page, also within quotes; halves of characters are marked."""
  return html.escape(str(text).encode("utf-8", "replace").decode())


def table(rows: Sequence[Sequence[Any]]) -> str:
  """A table of a header and rows, of plain text."""

  def line(cells: Sequence[Any], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(c)}' for c in cells)}</tr>"

  lines = [line(rows[0], "th"), *(line(row, "td") for row in rows[1:])]
  return f"<div class=wide><table>{''.join(lines)}</table></div>"


def picture(
  pixels: UInt8[np.ndarray, "h w 3"], title: str, *, kind: str = "sheet"
) -> str:
  """A picture within the page, in whichever format takes less.

  Args:
    pixels: of it.
    title: plain text that says what it shows.
    kind: class for the page's style.
  """
  forms = {}
  for name, options in (("PNG", {}), ("JPEG", {"quality": 90})):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, name, **options)
    forms[name] = data.getvalue()
  best = min(forms, key=lambda name: len(forms[name]))
  encoded = base64.b64encode(forms[best]).decode()
  height, width = pixels.shape[:2]
  return (
    f"<img class={kind} alt='{escape(title)}' width={width} height={height} "
    f"src='data:image/{best.lower()};base64,{encoded}'>"
  )


def page(title: str, body: Sequence[str], *, style: str = "") -> str:
  """A page.

  Args:
    title: plain text.
    body: of HTML.
    style: CSS beside that of every page.
  """
  return "\n".join(
    [
      "<!DOCTYPE html>",
      '<html lang="en">',
      "<head>",
      '<meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f"<title>{escape(title)}</title>",
      f"<style>\n{_STYLE}{style}</style>",
      "</head>",
      "<body>",
      *body,
      "</body>",
      "</html>",
      "",
    ]
  )


_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; color: #18181c;
  background: #fff; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .18em .9em .18em 0;
  overflow-wrap: anywhere; }
th { border-bottom: 2px solid #18181c; }
th, td:first-child { white-space: nowrap; }
td.n { text-align: right; padding-left: .5em;
  font-variant-numeric: tabular-nums; }
.note { color: #666; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure { margin: .6em 0; max-width: 100%; } figcaption { color: #666; }
summary { cursor: pointer; color: #0050a0; }
a { color: #0050a0; text-decoration: none; }
"""
