"""Pages of blocks, written as one HTML file and as Markdown with its images.

Text in blocks is plain text; `html()` and `markdown(files)` escape it.
"""

from __future__ import annotations

import base64
import io
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mtv_jax.report import charts
from mtv_jax.report.charts import COLOURS, escape, read_css
from mtv_jax.utils import atomic, plots

_MAX_COLUMN = 540  # Maximum width of a column of images, in pixels.


@runtime_checkable
class PageBlock(Protocol):
  """A part of a page."""

  def html(self) -> str:
    """Renders HTML."""

  def markdown(self, files: PageFiles) -> str:
    """Renders Markdown; adds images and charts to `files`."""


class ImageFile(NamedTuple):
  """An image of a page, and its file for Markdown."""

  title: str
  image: np.ndarray  # uint8 [H, W, 3], embedded in the HTML
  path: str  # relative to the page
  source: pathlib.Path | None = None  # copied to `path`; None writes `image`


class PageFiles:
  """Files that a Markdown page links to: text, images, or copies."""

  def __init__(self):
    self._contents: dict[str, str | np.ndarray | pathlib.Path] = {}

  def add(self, path: str, content: str | np.ndarray | pathlib.Path) -> str:
    """Adds a file; returns its path, renamed if other content uses it."""
    file = pathlib.PurePosixPath(path)
    while True:
      earlier = self._contents.setdefault(str(file), content)
      is_array = isinstance(earlier, np.ndarray) or isinstance(
        content, np.ndarray
      )
      if earlier is content or (not is_array and earlier == content):
        return str(file)
      file = file.with_stem(f"{file.stem}-")

  def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the files; returns their paths."""
    for name, content in self._contents.items():
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if isinstance(content, str):
        atomic.write_text(path, content)
      elif isinstance(content, np.ndarray):
        plots.save_image(content, path)
      elif not path.exists() or not path.samefile(content):
        with atomic.replace_file(path) as temporary:
          shutil.copyfile(content, temporary)
    return [folder / name for name in self._contents]


class Swatch(str):
  """A table cell with a dot in a series' colour."""

  colour: int

  def __new__(cls, text: str, colour: int) -> Swatch:
    cell = super().__new__(cls, text)
    cell.colour = colour
    return cell


def _html_text(cell: str) -> str:
  text = escape(cell)
  if "\n" in text:
    text = f"<span class=lines>{text.replace(chr(10), '<br>')}</span>"
  if isinstance(cell, Swatch):
    colour = f"background:var(--c{cell.colour % COLOURS})"
    text = f"<i class=swatch style='{colour}'></i>{text}"
  return text


class Heading(NamedTuple):
  """A heading whose text is its anchor."""

  text: str
  level: int = 2

  def html(self) -> str:
    text = escape(self.text)
    return f"<h{self.level} id='{text}'>{text}</h{self.level}>"

  def markdown(self, files: PageFiles) -> str:
    return f"{'#' * self.level} {_escape_markdown(self.text)}"


class Note(NamedTuple):
  """A grey paragraph."""

  text: str

  def html(self) -> str:
    return f"<p class=note>{escape(self.text)}</p>"

  def markdown(self, files: PageFiles) -> str:
    return _escape_markdown(self.text)


class Bullets(NamedTuple):
  """A bulleted list."""

  lines: Sequence[str]

  def html(self) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}' for line in self.lines)}</ul>"

  def markdown(self, files: PageFiles) -> str:
    return "\n".join(f"- {_escape_markdown(line)}" for line in self.lines)


class Code(NamedTuple):
  """A block of code."""

  text: str

  def html(self) -> str:
    return f"<pre>{escape(self.text)}</pre>"

  def markdown(self, files: PageFiles) -> str:
    # The fence must be longer than any run of backticks in the text.
    runs = re.findall("`+", self.text)
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return f"{fence}\n{self.text}\n{fence}"


class Table(NamedTuple):
  """A header, then rows; columns from index `numbers` on are right-aligned."""

  rows: Sequence[Sequence[str]]
  numbers: int | None = None

  def html(self) -> str:
    head, *rows = self.rows
    lines = ["<tr>", *(self._html_cell("th", k, x) for k, x in enumerate(head))]
    for row in rows:
      lines.append("<tr>")
      lines += (self._html_cell("td", k, x) for k, x in enumerate(row))
    css = " class=stacked" if len(head) > 2 else ""
    return f"<div class=wide><table{css}>{''.join(lines)}</table></div>"

  def _html_cell(self, tag: str, k: int, cell: str) -> str:
    text = _html_text(cell)
    css = " class=n" if self.numbers is not None and k >= self.numbers else ""
    # Narrow windows stack the cells and prefix each with its header.
    if tag == "td" and k and len(self.rows[0]) > 2:
      css += f" data-head='{escape(self.rows[0][k])}'"
    return f"<{tag}{css}>{text}"

  def markdown(self, files: PageFiles) -> str:
    lines = []
    for row in self.rows:
      cells = [_escape_markdown(cell) for cell in row]
      cells = [c.replace("|", "\\|").replace("\n", " ") for c in cells]
      lines.append(f"| {' | '.join(cells)} |")
    width = len(self.rows[0])
    num_texts = width if self.numbers is None else self.numbers
    rule = "|---" * num_texts + "|---:" * (width - num_texts) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


class Headline(NamedTuple):
  """One figure of an evaluation, for one encoder or several."""

  title: str
  metric: str
  figures: Sequence[str]  # a value, or a `Swatch` per encoder
  details: str  # size of the test set, and chance
  verdicts: Sequence[str]

  def html(self) -> str:
    lines = []
    for figure in self.figures:
      text = _html_text(figure)
      if not isinstance(figure, Swatch):
        number, sign, error = text.partition(" ± ")
        text = f"<b>{number}</b> <span class=note>{sign}{error}</span>"
      lines.append(f"<p>{text}</p>")
    details = escape(self.details).replace(" %", "&nbsp;%")
    lines.append(f"<p class=note>{details}</p>")
    lines += [f"<p>{escape(line)}</p>" for line in self.verdicts]
    return (
      f"<section><h3>{escape(self.title)}</h3>"
      f"<p class=note>{escape(self.metric)}</p>{''.join(lines)}</section>"
    )


class Headlines(NamedTuple):
  """Headlines side by side; a table in Markdown."""

  headlines: Sequence[Headline]

  def html(self) -> str:
    inner = "".join(headline.html() for headline in self.headlines)
    return f"<div class=headlines>{inner}</div>"

  def markdown(self, files: PageFiles) -> str:
    rows = [["evaluation", "metric", "value", "test set", "verdict"]]
    for title, metric, figures, details, verdicts in self.headlines:
      cells = ["; ".join(figures), details, " ".join(verdicts)]
      rows.append([title, metric, *cells])
    return Table(rows).markdown(files)


class Images(NamedTuple):
  """Images in as many columns as fit the window."""

  files: Sequence[ImageFile]

  def html(self) -> str:
    inner = "".join(
      f"<figure><figcaption>{escape(f.title)}</figcaption>"
      f"{html_image(f.image, f.title)}</figure>"
      for f in self.files
    )
    if len(self.files) < 2:
      return inner
    width = min(_MAX_COLUMN, max(file.image.shape[1] for file in self.files))
    return f"<div class=columns style='column-width:{width}px'>{inner}</div>"

  def markdown(self, files: PageFiles) -> str:
    return "\n\n".join(
      _link_image(
        f.title,
        files.add(f.path, f.image if f.source is None else f.source),
      )
      for f in self.files
    )


class Charts(NamedTuple):
  """A row of charts."""

  charts: Sequence[charts.Chart]

  def html(self) -> str:
    inner = "".join(f"<div>{chart.svg}</div>" for chart in self.charts)
    return f"<div class=charts>{inner}</div>"

  def markdown(self, files: PageFiles) -> str:
    return "\n".join(
      _link_image(
        chart.title,
        files.add(f"charts/{chart.name}.svg", charts.to_file(chart)),
      )
      for chart in self.charts
    )


class Details(NamedTuple):
  """Blocks collapsed under a summary."""

  summary: str
  blocks: Sequence[PageBlock]

  def html(self) -> str:
    inner = "".join(block.html() for block in self.blocks)
    return (
      f"<details><summary>{escape(self.summary)}</summary>{inner}</details>"
    )

  def markdown(self, files: PageFiles) -> str:
    # Markdown can't collapse blocks.
    parts = [f"**{_escape_markdown(self.summary)}**"]
    return "\n\n".join(parts + [b.markdown(files) for b in self.blocks])


def html_image(pixels: UInt8[np.ndarray, "h w 3"], title: str) -> str:
  """An inline image with alt text, as PNG or JPEG, whichever is smaller."""
  encoded = {}
  for name, options in (("png", {}), ("jpeg", {"quality": 90})):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, name, **options)
    encoded[name] = base64.b64encode(data.getvalue()).decode()
  smallest = min(encoded, key=lambda name: len(encoded[name]))
  height, width = pixels.shape[:2]
  return (
    f"<img alt='{escape(title)}' width={width} height={height} "
    f"src='data:image/{smallest};base64,{encoded[smallest]}'>"
  )


def _escape_markdown(text: Any) -> str:
  """Escapes HTML tags and entities, which Markdown would interpret."""
  return str(text).replace("&", "&amp;").replace("<", "&lt;")


def _link_image(title: str, path: str) -> str:
  """A Markdown image link, with spaces and brackets escaped."""
  title = re.sub(r"([\[\]])", r"\\\1", _escape_markdown(title))
  return f"![{title}]({urllib.parse.quote(path, safe='/+~', errors='replace')})"


def html_page(title: str, parts: Sequence[str], *, style: str = "") -> str:
  """A complete HTML page; `style` is extra CSS."""
  body = "\n".join(parts)
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{read_css("chart")}{read_css("page")}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_pages(
  title: str,
  blocks: Iterable[PageBlock],
  output: str | os.PathLike,
  *,
  names: tuple[str, str] = ("report.html", "report.md"),
) -> list[pathlib.Path]:
  """Writes blocks as HTML and Markdown; returns the pages, then their files."""
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  blocks = [Heading(title, level=1), *blocks]
  page_files = PageFiles()
  markdown = "\n\n".join(block.markdown(page_files) for block in blocks)
  files = page_files.write(output)
  texts = html_page(title, [b.html() for b in blocks]), f"{markdown}\n"
  for name, text in zip(names, texts, strict=True):
    atomic.write_text(output / name, text)
  for folder in {output, *(file.parent for file in files)}:
    atomic.remove_abandoned(folder)
  return [*(output / name for name in names), *files]
