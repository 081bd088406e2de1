"""Looks at label sets: a sheet of pictures, a page, and statistics."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtv_jax.data.labels import bases as label_bases
from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.join import AlignedLabels, KeyedLabels, Labels
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.experts.inspection import cards, findings, page, sheet, statistics
from mtv_jax.experts.inspection.findings import percent
from mtv_jax.experts.inspection.page import different, spread
from mtv_jax.utils.errors import did_you_mean
from mtv_jax.utils.plots import one_line

JOINS = ("aligned", "key")
# Longer side of the page's pictures.
_PAGE = 456
# Phrases that the terminal shows.
_PHRASES = 5


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
    data: the shards, tars or ArrayRecord files.
    depth, boxes: folders of label sets, one of them at least.
    out: folder to write into, made if needed.
    count: of records in the pictures, drawn by `seed`.
    seed: of the choice.
    size: longer side of a picture.
    min_score: boxes below are left out, of pictures and statistics.
    records: for statistics, at most so many labels of a set are read, evenly
      spaced; None for all.
    index_dir: of the tars' indices, and of the keys' for joins by key.
    join: "aligned", for sets made for these shards, whose statistics are then
      of the shards of `data`; "key", for other copies, with those of the set.
    progress: is called with the kind, the labels read and how many there are.

  Returns:
    The statistics, as they are written.

  Raises:
    ValueError: there is no label set, or a number makes no sense.
    FileNotFoundError: a folder or a file of it is missing.
    LabelError: a set of another kind or for other records.
  """
  folders = {"boxes": boxes, "depth": depth}
  sets = {
    kind: LabelSet(folder, kind=kind)
    for kind, folder in folders.items()
    if folder is not None
  }
  if not sets:
    raise ValueError(
      "No label set is given: name the folder of one of boxes, of depth, or"
      " one of each."
    )
  if count < 1 or size < 64:
    raise ValueError(
      f"count={count} and size={size}: expected at least 1 record and pictures"
      " of 64 pixels."
    )
  source = label_bases.open_base(data, index_dir=index_dir, captions="optional")
  joined = {
    kind: _joined(labels, source, join, index_dir)
    for kind, labels in sets.items()
  }
  folder = Path(out).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  shards = set(map(label_sets.stem, source.files))
  gathered = {
    kind: statistics.gather(
      labels,
      shards=shards if join == "aligned" else None,
      records=records,
      min_score=min_score,
      progress=lambda done, total, kind=kind: progress(kind, done, total),
    )
    for kind, labels in sets.items()
  }
  summary = {
    "data": list(data),
    "records": len(source),
    "sets": gathered,
    "look_at": [
      dataclasses.asdict(finding)
      for found in gathered.values()
      for finding in findings.look_at(found)
    ],
  }
  chosen = _chosen(len(source), count, seed)

  def drawn(side: int) -> list[cards.Card]:
    draw = functools.partial(
      cards.draw, source, joined, size=side, min_score=min_score
    )
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      return list(pool.map(draw, chosen))

  _write(folder, summary, drawn, size)
  return summary


def _write(
  folder: Path,
  summary: Mapping[str, Any],
  drawn: Callable[[int], list[cards.Card]],
  size: int,
) -> None:
  """Sheet, page and figures; `drawn` gives the pictures of a size."""
  sets = summary["sets"].items()
  names = [f"{kind} from {found['folder']}" for kind, found in sets]
  title = f"{', '.join(summary['data'])}: {', '.join(names)}"
  picture = sheet.draw(drawn(size), title=title, size=size)
  Image.fromarray(picture).save(folder / "sheet.png")
  html = page.html(summary, drawn(max(size, _PAGE)))
  (folder / "index.html").write_text(html, encoding="utf-8")
  text = json.dumps(summary, ensure_ascii=False, indent=1)
  (folder / "statistics.json").write_text(f"{text}\n", encoding="utf-8")


def _joined(
  labels: LabelSet, source: Any, join: str, index_dir: str | None
) -> Labels:
  if join not in JOINS:
    raise ValueError(f"join={join!r}. {did_you_mean(join, JOINS)}")
  if join == "key":
    return KeyedLabels(labels, source, index_dir=index_dir)
  return AlignedLabels(labels, source)


def _chosen(records: int, count: int, seed: int) -> list[int]:
  """Numbers of the records to draw, in their order."""
  rng = np.random.default_rng(seed)
  chosen = rng.choice(records, min(count, records), replace=False)
  return sorted(chosen.tolist())


def terminal(summary: Mapping[str, Any]) -> str:
  """The statistics in a few lines."""
  lines = [f"{', '.join(summary['data'])}: {summary['records']:,} records"]
  for kind, found in summary["sets"].items():
    read = found["read"]
    share = percent(found["labelled"] / max(found["records"], 1))
    lines.append(
      f"{kind} from {found['folder']}: {found['labelled']:,} of"
      f" {found['records']:,} records have a label ({share});"
      f" {read['records']:,} labels read"
    )
    of_kind = {"boxes": _of_boxes, "depth": _of_depth}[kind]
    lines += [f"  {name:18} {words}" for name, words in of_kind(found)]
  for finding in summary["look_at"]:
    lines.append(f"look at {finding['kind']}: {one_line(finding['text'])}")
  return "\n".join(lines)


def _of_boxes(found: Mapping[str, Any]) -> list[tuple[str, str]]:
  phrases = found["phrases"]
  frequent = ", ".join(
    f"{one_line(phrase)} {n:,}"
    for phrase, n in phrases["most_frequent"][:_PHRASES]
  )
  return [
    ("boxes an image", spread(found["boxes_an_image"])),
    ("scores", spread(found["scores"])),
    ("phrases", f"{different(phrases)} different: {frequent}"),
  ]


def _of_depth(found: Mapping[str, Any]) -> list[tuple[str, str]]:
  return [
    ("labelled pixels", spread(found["labelled_pixels"])),
    ("least", spread(found["low"])),
    ("greatest", spread(found["high"])),
  ]
