"""Draws labels and their statistics, to inspect before training.

  mtv-jax inspect_labels --data='shards/*.tar' --depth=labels/depth \\
      --boxes=labels/boxes --output=inspection
  mtv-jax inspect_labels --data='shards/*.tar' --boxes=labels/boxes \\
      --output=inspection --records=100000 --min_score=0.2

Pass --depth, --boxes or both. Writes into --output:
  index.html       self-contained page: records with boxes, phrases and scores,
                   depth in colours, captions; statistics, outliers, settings
  statistics.json  the statistics

The statistics cover all labels of the shards, read once in constant memory;
--records reads fewer, evenly spaced.
"""

import json
from typing import Literal

from mtv_jax.cli import arguments
from mtv_jax.data.labels.join import JOINS
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.report import labels
from mtv_jax.utils.progress import Progress


class Flags(arguments.ShardFlags):
  """Flags of `mtv-jax inspect_labels`.

  Args:
    depth: folder of a depth label set.
    boxes: folder of a box label set.
    output: folder to write into.
    count: number of records to draw.
    seed: seed for choosing these records.
    size: longer side of an image, in pixels.
    min_score: minimum score of a box, also for the statistics.
    records: labels per set to read for the statistics; default: all.
    join: key joins by record key, for labels of other copies of the images.
    json: print the statistics as JSON instead of a summary.
  """

  depth: str | None = None
  boxes: str | None = None
  output: str
  count: int = 24
  seed: int = 0
  size: int = 456
  min_score: float = 0.0
  records: int | None = None
  join: Literal[tuple(JOINS)] = "aligned"
  json: bool = False


def run(args: Flags) -> None:
  """Writes the files and prints a summary."""
  bars = {kind: Progress(unit=f"{kind} labels") for kind in KINDS}
  names = "depth boxes count seed size min_score records index_dir join"
  summary = labels.inspect_labels(
    args.data,
    out=args.output,
    progress=lambda kind, done, total: bars[kind](done, total),
    **{name: getattr(args, name) for name in names.split()},
  )
  if args.json:
    print(json.dumps(summary, ensure_ascii=False, indent=1))
    return
  print(labels.format_summary(summary))
  for name in ("index.html", "statistics.json"):
    print(f"wrote {args.output}/{name}")
