"""Parts of Markdown pages; the same functions as in `html`."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from typing import Any

from mtv_jax.utils.html import Bold


def escape(text: Any) -> str:
  """Text without HTML tags and entities, which Markdown may contain."""
  return str(text).replace("&", "&amp;").replace("<", "&lt;")


def heading(text: str, *, level: int = 2) -> str:
  """A heading."""
  return f"{'#' * level} {escape(text)}"


def note(text: str) -> str:
  """A paragraph."""
  return escape(text)


def table(rows: Sequence[Sequence[str]], *, numbers: int | None = None) -> str:
  """A table: a header, then rows; columns from `numbers` on align right."""
  lines = []
  for row in rows:
    cells = [
      f"**{escape(c)}**" if isinstance(c, Bold) else escape(c) for c in row
    ]
    cells = [c.replace("|", "\\|").replace("\n", " ") for c in cells]
    lines.append(f"| {' | '.join(cells)} |")
  texts = len(rows[0]) if numbers is None else numbers
  rule = "|---" * texts + "|---:" * (len(rows[0]) - texts) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def bullets(lines: Sequence[str]) -> str:
  """A list."""
  return "\n".join(f"- {escape(line)}" for line in lines)


def details(summary: str, parts: Sequence[str]) -> str:
  """The parts below their summary, as Markdown can't hide them."""
  return "\n\n".join([f"**{escape(summary)}**", *parts])


def images(figures: Sequence[Any]) -> str:
  """Links to the files of images; each has a `title` and a `path`."""
  return "\n\n".join(_image(f.title, f.path) for f in figures)


def charts(drawn: Sequence[Any]) -> str:
  """Links to the files of charts; each has a `title` and a `name`."""
  return "\n".join(_image(c.title, f"charts/{c.name}.svg") for c in drawn)


def _image(title: str, path: str) -> str:
  """A link to an image; spaces and brackets would end its path or its title."""
  title = re.sub(r"([\[\]])", r"\\\1", escape(title))
  return f"![{title}]({urllib.parse.quote(path, safe='/+~', errors='replace')})"


def code(text: str) -> str:
  """A block of code, in a fence that is longer than those in the text."""
  runs = re.findall("`+", text)
  fence = "`" * max(3, 1 + max(map(len, runs), default=0))
  return f"{fence}\n{text}\n{fence}"
