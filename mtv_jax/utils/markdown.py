"""Parts of Markdown pages; the same functions as in `html`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtv_jax.utils.html import Bold


def heading(text: str, *, level: int = 2) -> str:
  """A heading."""
  return f"{'#' * level} {text}"


def note(text: str) -> str:
  """A paragraph."""
  return text


def table(rows: Sequence[Sequence[str]], *, numbers: int | None = None) -> str:
  """A table: a header, then rows; columns from `numbers` on align right."""
  lines = []
  for row in rows:
    cells = [f"**{c}**" if isinstance(c, Bold) else c for c in row]
    cells = [c.replace("|", "\\|").replace("\n", " ") for c in cells]
    lines.append(f"| {' | '.join(cells)} |")
  texts = len(rows[0]) if numbers is None else numbers
  rule = "|---" * texts + "|---:" * (len(rows[0]) - texts) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def bullets(lines: Sequence[str]) -> str:
  """A list."""
  return "\n".join(f"- {line}" for line in lines)


def details(summary: str, parts: Sequence[str]) -> str:
  """The parts below their summary, as Markdown can't hide them."""
  return "\n\n".join([f"**{summary}**", *parts])


def images(figures: Sequence[Any]) -> str:
  """Links to the files of images."""
  return "\n\n".join(f"![{f.title}]({f.path})" for f in figures)


def charts(drawn: Sequence[Any]) -> str:
  """Links to the files of charts; each has a `title` and a `name`."""
  return "\n".join(f"![{c.title}](charts/{c.name}.svg)" for c in drawn)


def code(text: str) -> str:
  """A block of code."""
  return f"```\n{text}\n```"
