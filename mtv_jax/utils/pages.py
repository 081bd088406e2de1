"""Pages of blocks: as HTML in one file, and as Markdown with its images."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mtv_jax.utils import atomic, charts, html, markdown


class Sheet(NamedTuple):
  """An image of an evaluation, as `writer.images` takes it."""

  title: str
  image: np.ndarray
  path: str  # relative to the report
  source: pathlib.Path


class Block(NamedTuple):
  """A call of a function that `utils.html` and `utils.markdown` have."""

  function: str
  content: Any
  options: dict[str, Any] = {}  # noqa: RUF012
  inner: tuple[Block, ...] = ()  # of `details`


def write_pages(
  title: str, blocks: Sequence[Block], output: str | os.PathLike
) -> list[pathlib.Path]:
  """Writes blocks as `report.html` and as `report.md` with its images."""
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  blocks = [Block("heading", title, {"level": 1}), *blocks]
  for block in _flatten(blocks):
    if block.function == "charts":
      charts.write_files(block.content, output)
    elif block.function == "images":
      for sheet in block.content:
        path = output / sheet.path
        if not path.exists() or not path.samefile(sheet.source):
          path.parent.mkdir(parents=True, exist_ok=True)
          shutil.copyfile(sheet.source, path)
  page = html.page(title, _render(blocks, html))
  text = "\n\n".join(_render(blocks, markdown)) + "\n"
  pages = {"report.html": page, "report.md": text}
  for name, content in pages.items():
    # Lone surrogates of file names have no encoding.
    atomic.write(output / name, content.encode("utf-8", "replace"))
  return [output / name for name in pages]


def _flatten(blocks: Sequence[Block]) -> Iterator[Block]:
  for block in blocks:
    yield block
    yield from _flatten(block.inner)


def _render(blocks: Sequence[Block], writer: ModuleType) -> list[str]:
  parts = []
  for block in blocks:
    write, options = getattr(writer, block.function), dict(block.options)
    if block.inner:
      parts.append(write(block.content, _render(block.inner, writer)))
    else:
      parts.append(write(block.content, **options))
  return parts
