"""Inspection of label sets: writes a sheet, a page and statistics."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from mtv_jax.config.options import PositiveInt, Range, check_value
from mtv_jax.data import registry
from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.join import JOINS, open_labels
from mtv_jax.experts.inspection import cards, findings, page, statistics
from mtv_jax.experts.inspection.findings import percent
from mtv_jax.utils import atomic, plots
from mtv_jax.utils.cores import available_cores
from mtv_jax.utils.errors import ConfigError, check_choice
from mtv_jax.utils.plots import one_line

_PAGE_SIZE = 456  # longer side of the images on the page
_PHRASES = 5  # on the terminal


def inspect(
  data: Sequence[str],
  *,
  depth: str | os.PathLike | None = None,
  boxes: str | os.PathLike | None = None,
  out: str | os.PathLike,
  count: int = 24,
  seed: int = 0,
  size: int = 304,
  min_score: float | int = 0.0,
  records: int | None = None,
  index_dir: str | None = None,
  join: str = "aligned",
  progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> dict[str, Any]:
  """Writes `sheet.png`, `index.html` and `statistics.json`.

  Args:
    data: the shards.
    depth, boxes: folders of label sets, at least one of them.
    out: folder to write to; created if missing.
    count, seed: number of records in the images, and of their selection.
    size: longer side of an image.
    min_score: minimum score of a box, in images and statistics.
    records: the most labels of a set in the statistics, evenly spaced; None
      for all.
    index_dir: folder of the indices of tar files, and of keys to join by.
    join: "aligned", for sets of these shards, with statistics of the shards of
      `data`; "key", for other copies, with statistics of the whole set.
    progress: called with the kind, the number of labels read and to read.

  Returns:
    The statistics as written.

  Raises:
    ConfigError: there is no label set, or a number is out of range.
    FileNotFoundError: a folder or a file is missing.
    LabelError: a set has another kind or belongs to other records.
  """
  folders = {k: f for k, f in (("boxes", boxes), ("depth", depth)) if f}
  if not folders:
    raise ConfigError(
      "No label set is given: name a folder of boxes, of depth, or of each."
    )
  check_value(count, PositiveInt, "count")
  check_value(size, Annotated[int, Range(min=64)], "size")
  check_choice("join", join, JOINS)
  source = registry.open_files(data, index_dir=index_dir, captions="optional")
  joined = {
    kind: open_labels(source, kind, path=path, join=join, index_dir=index_dir)
    for kind, path in folders.items()
  }
  folder = Path(out).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  shards = {label_sets.shard_name(file) for file in source.files}
  stats = {
    kind: statistics.gather(
      labels.label_set,
      shards=shards if join == "aligned" else None,
      records=records,
      min_score=min_score,
      progress=functools.partial(progress, kind),
    )
    for kind, labels in joined.items()
  }
  summary = {
    "data": list(data),
    "records": len(source),
    "sets": stats,
    "look_at": [
      finding
      for set_stats in stats.values()
      for finding in findings.find(set_stats)
    ],
  }
  rng = np.random.default_rng(seed)
  chosen = rng.choice(len(source), min(count, len(source)), replace=False)
  chosen = sorted(chosen.tolist())

  def draw(size: int) -> list[cards.Card]:
    draw_card = functools.partial(
      cards.draw_card, source, joined, size=size, min_score=min_score
    )
    with futures.ThreadPoolExecutor(available_cores()) as pool:
      return list(pool.map(draw_card, chosen))

  names = [f"{kind} from {s['folder']}" for kind, s in stats.items()]
  title = f"{', '.join(data)}: {', '.join(names)}"
  sheet = cards.draw_sheet(draw(size), title=title, size=size)
  plots.save_image(sheet, folder / "sheet.png")
  html = page.render(summary, draw(max(size, _PAGE_SIZE)))
  atomic.write_text(folder / "index.html", html)
  text = json.dumps(summary, ensure_ascii=False, indent=1)
  atomic.write_text(folder / "statistics.json", f"{text}\n")
  atomic.remove_abandoned(folder)
  return summary


def format_summary(summary: Mapping[str, Any]) -> str:
  """The statistics as lines for a terminal."""
  lines = [f"{', '.join(summary['data'])}: {summary['records']:,} records"]
  for kind, stats in summary["sets"].items():
    share = percent(stats["labelled"] / max(stats["records"], 1))
    lines.append(
      f"{kind} from {stats['folder']}: {stats['labelled']:,} of"
      f" {stats['records']:,} records have a label ({share})"
    )
    rows = list(page.describe(stats))
    if kind == "boxes":
      frequent = stats["phrases"]["most_frequent"][:_PHRASES]
      text = ", ".join(f"{one_line(phrase)} {n:,}" for phrase, n in frequent)
      rows.append(("most frequent phrases", text))
    lines += [f"  {name:36} {text}" for name, text in rows]
  for finding in summary["look_at"]:
    lines.append(f"look at {finding['kind']}: {one_line(finding['text'])}")
  return "\n".join(lines)
