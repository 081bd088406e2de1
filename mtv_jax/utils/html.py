"""Parts of self-contained HTML pages: text, tables, images."""

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
  """Escapes text, also for attributes; lone surrogates become `?`."""
  return html.escape(str(text).encode("utf-8", "replace").decode())


class Bold(str):
  """A cell of a table in bold."""


class Link(str):
  """A cell that links to the heading with its text."""


def heading(text: str, *, level: int = 2) -> str:
  """A heading with its text as anchor."""
  text = escape(text)
  return f"<h{level} id='{text}'>{text}</h{level}>"


def note(text: str) -> str:
  """A grey paragraph of plain text."""
  return f"<p class=note>{escape(text)}</p>"


def table(rows: Sequence[Sequence[Any]], *, numbers: int | None = None) -> str:
  """A table of plain text: a header, then rows.

  Args:
    rows: lists of cells: text, `Bold` or `Link`.
    numbers: the first column of numbers, which are aligned to the right.
  """
  lines = []
  for i, row in enumerate(rows):
    lines.append("<tr>")
    for k, cell in enumerate(row):
      css = " class=n" if numbers is not None and k >= numbers else ""
      lines.append(f"<{'td' if i else 'th'}{css}>{_cell(cell)}")
  return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _cell(cell: Any) -> str:
  text = escape(cell)
  if isinstance(cell, Link):
    return f"<a href='#{text}'>{text}</a>"
  return f"<b>{text}</b>" if isinstance(cell, Bold) else text


def bullets(lines: Sequence[str]) -> str:
  """A list of plain text."""
  return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def details(summary: str, parts: Sequence[str]) -> str:
  """HTML that a click on its summary shows."""
  inner = "".join(parts)
  return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def images(figures: Sequence[Any]) -> str:
  """A row of images; each has a `title`, an `image` and its file's `path`."""
  several = " several" if len(figures) > 1 else ""
  inner = "".join(
    f"<figure>{image(f.image, f.title)}"
    f"<figcaption>{escape(f.title)}</figcaption></figure>"
    for f in figures
  )
  return f"<div class='figures{several}'>{inner}</div>"


def image(pixels: UInt8[np.ndarray, "h w 3"], title: str) -> str:
  """An inline image (PNG or JPEG, whichever is smaller) with its alt text."""
  encoded = {}
  for name, options in (("png", {}), ("jpeg", {"quality": 90})):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, name, **options)
    encoded[name] = base64.b64encode(data.getvalue()).decode()
  best = min(encoded, key=lambda name: len(encoded[name]))
  height, width = pixels.shape[:2]
  return (
    f"<img alt='{escape(title)}' width={width} height={height} "
    f"src='data:image/{best};base64,{encoded[best]}'>"
  )


def page(title: str, body: Sequence[str], *, style: str = "") -> str:
  """A whole page of HTML parts, with CSS beside that of every page."""
  body = "\n".join(body)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; color: #18181c;
  background: #fff; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { text-align: left; vertical-align: top; padding: .18em .9em .18em 0;
  overflow-wrap: anywhere; }
th { border-bottom: 2px solid #18181c; }
th, td:first-child { white-space: nowrap; }
.n { text-align: right; padding-left: .5em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.note { color: #666; }
.wide { overflow-x: auto; }
img { max-width: 100%; height: auto; }
figure { margin: .6em 0; max-width: 100%; } figcaption { color: #666; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2em; align-items: start; }
.several figure { max-width: calc(50% - .6em); }
summary { cursor: pointer; color: #0050a0; }
a { color: #0050a0; text-decoration: none; }
"""
