"""Shows what is in label sets: what to look at before training on them.

  python tools/inspect_labels.py --data='shards/*.tar' --depth=labels/depth \
      --boxes=labels/boxes --out=inspection
  python tools/inspect_labels.py --data='shards/*.tar' --boxes=labels/boxes \
      --out=inspection --records=100000 --min_score=0.2

Either kind may be left out. Writes, into --out:
  sheet.png        some records: their image with boxes, phrases and scores,
                   depth in colours, caption and key
  index.html       the same, larger, with the statistics, what stands out in
                   them and the settings of the sets; needs no other file
  statistics.json  the statistics, for programs

The statistics are of all labels of the shards of --data, read once in constant
memory; --records reads fewer, evenly spaced.
"""

import argparse
import json
from collections.abc import Callable, Sequence

from mtv_jax.cli import errors
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.experts.inspection import inspect_labels
from mtv_jax.utils.progress import Progress


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add(
    "--data",
    nargs="+",
    required=True,
    help="the shards: .tar or .array_record, ranges and globs",
  )
  add("--depth", help="folder of a label set of depth")
  add("--boxes", help="folder of a label set of boxes")
  add("--out", required=True, help="folder to write into")
  add("--count", type=int, default=24, help="records in the pictures")
  add("--seed", type=int, default=0, help="of the choice of these")
  add("--size", type=int, default=304, help="longer side of a picture")
  add(
    "--min_score",
    type=float,
    default=0.0,
    help="boxes below are left out, of the statistics too",
  )
  add(
    "--records",
    type=int,
    help="labels of a set to read for the statistics (default: all)",
  )
  add(
    "--join",
    default="aligned",
    choices=inspect_labels.JOINS,
    help="by key for sets made on another copy of the images",
  )
  add("--index_dir", help="of the tars' indices (default: beside them)")
  add(
    "--json",
    action="store_true",
    help="print the statistics as JSON in place of a few lines",
  )
  args = parser.parse_args(argv)
  with errors.readable_errors("inspect_labels"):
    summary = inspect_labels.inspect(
      args.data,
      depth=args.depth,
      boxes=args.boxes,
      out=args.out,
      count=args.count,
      seed=args.seed,
      size=args.size,
      min_score=args.min_score,
      records=args.records,
      index_dir=args.index_dir,
      join=args.join,
      progress=_progress(),
    )
  if args.json:
    print(json.dumps(summary, ensure_ascii=False, indent=1))
    return
  print(inspect_labels.format_summary(summary))
  for name in ("sheet.png", "index.html", "statistics.json"):
    print(f"written: {args.out}/{name}")


def _progress() -> Callable[[str, int, int], None]:
  bars = {kind: Progress(unit=f"labels of {kind}") for kind in KINDS}
  return lambda kind, done, total: bars[kind](done, total)


if __name__ == "__main__":
  main()
