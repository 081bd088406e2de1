"""Pages of blocks: as HTML in one file, and as Markdown with its images."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mtv_jax.utils import atomic, charts, html, markdown, plots


class ImageFile(NamedTuple):
  """An image of a page, and the file that Markdown links to."""

  title: str
  image: np.ndarray  # uint8 [H, W, 3], as in the HTML
  path: str  # relative to the page
  source: pathlib.Path | None = None  # that is copied; None to write `image`


class Block(NamedTuple):
  """A call of a function that `utils.html` and `utils.markdown` have."""

  function: str
  content: Any
  options: dict[str, Any] = {}  # noqa: RUF012
  inner: tuple[Block, ...] = ()  # of `details`


def write_pages(
  title: str,
  blocks: Iterable[Block],
  output: str | os.PathLike,
  *,
  names: tuple[str, str] = ("report.html", "report.md"),
) -> list[pathlib.Path]:
  """Writes blocks as HTML, and as Markdown with its charts and images.

  Returns:
    The two pages, then the images and charts.
  """
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  blocks = [Block("heading", title, {"level": 1}), *blocks]
  blocks = _name_files(blocks, {})
  files = []
  for block in _flatten(blocks):
    if block.function == "images":
      files += [_write_image(image, output) for image in block.content]
  for block in _flatten(blocks):
    if block.function == "charts":
      files += charts.write_files(block.content, output)
  texts = (
    html.page(title, _render(blocks, html)),
    "\n\n".join(_render(blocks, markdown)) + "\n",
  )
  for name, text in zip(names, texts, strict=True):
    atomic.write_text(output / name, text)
  for folder in {output, *(file.parent for file in files)}:
    atomic.remove_abandoned(folder)
  return [*(output / name for name in names), *files]


def _name_files(blocks: Sequence[Block], used: dict[str, Any]) -> list[Block]:
  """Gives charts and images that differ files that differ.

  "a/b" and "a:b" are both "a-b" in the name of a file.
  """
  named = []
  for block in blocks:
    content = block.content
    if block.function == "charts":
      content = [_name_chart(chart, used) for chart in content]
    elif block.function == "images":
      content = [_name_image(image, used) for image in content]
    inner = tuple(_name_files(block.inner, used))
    named.append(block._replace(content=content, inner=inner))
  return named


def _name_chart(chart: charts.Chart, used: dict[str, Any]) -> charts.Chart:
  while used.setdefault(f"charts/{chart.name}", chart.svg) != chart.svg:
    chart = chart._replace(name=f"{chart.name}-")
  return chart


def _name_image(image: ImageFile, used: dict[str, Any]) -> ImageFile:
  origin = image.source or id(image.image)
  while used.setdefault(image.path, origin) != origin:
    path = pathlib.PurePosixPath(image.path)
    image = image._replace(path=str(path.with_stem(f"{path.stem}-")))
  return image


def _write_image(image: ImageFile, output: pathlib.Path) -> pathlib.Path:
  path = output / image.path
  if image.source is None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plots.save_image(image.image, path)
  elif not path.exists() or not path.samefile(image.source):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replace_file(path) as temporary:
      shutil.copyfile(image.source, temporary)
  return path


def _flatten(blocks: Sequence[Block]) -> Iterator[Block]:
  for block in blocks:
    yield block
    yield from _flatten(block.inner)


def _render(blocks: Sequence[Block], writer: ModuleType) -> list[str]:
  parts = []
  for block in blocks:
    write = getattr(writer, block.function)
    if block.function == "details":
      parts.append(write(block.content, _render(block.inner, writer)))
    else:
      parts.append(write(block.content, **block.options))
  return parts
