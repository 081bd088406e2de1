"""Compares an expert's boxes with true ones: recall, precision, overlap.

  python tools/make_labels.py boxes --base='shards/*.tar' \
      --output=labels/truth --instances instances_val2017.json
  python tools/label.py --expert=boxes --weights=FastestDet.onnx \
      --names=coco.names --data='shards/*.tar' --out=labels/boxes
  python tools/match_boxes.py --labels=labels/boxes --truth=labels/truth \
      --rename sofa=couch tvmonitor=tv --phrases=10

Both sets are of the same shards. What counts as a pair is at the top of
mtv_jax/experts/labelling/box_matching.py.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from mtv_jax.cli.errors import readable_errors
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.experts.labelling import box_matching


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; errors end the program with their message."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--labels", required=True, help="the label set of an expert")
  add("--truth", required=True, help="the label set of true boxes")
  add("--iou", type=float, default=0.5, help="that makes a pair")
  add(
    "--rename",
    nargs="+",
    default=[],
    metavar="LABEL=TRUTH",
    help="what the true boxes call a phrase",
  )
  add("--phrases", type=int, default=0, help="how many to list")
  add("--json", help="file to write")
  args = parser.parse_args(argv)
  with readable_errors("match_boxes"):
    agreement = box_matching.compare(
      LabelSet(args.labels, kind="boxes"),
      LabelSet(args.truth, kind="boxes"),
      iou=args.iou,
      renamed=box_matching.parse_renamed(args.rename),
    )
    if args.json:
      text = json.dumps(agreement.to_dict(), indent=1) + "\n"
      Path(args.json).write_text(text, encoding="utf-8")
  print(f"{agreement.images:,} images with true boxes, IoU >= {args.iou:g}")
  if agreement.unlabelled:
    print(f"{agreement.unlabelled:,} of them have no label")
  print(agreement.table(phrases=args.phrases))
  if never := agreement.never_true:
    print(f"in no true box: {', '.join(never)}")


if __name__ == "__main__":
  main()
