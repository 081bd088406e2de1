"""Compares an expert's boxes with annotated ones: recall, precision, IoU.

  mtv-jax make_labels boxes --data='shards/*.tar' \\
      --output=labels/truth --instances instances_val2017.json
  mtv-jax label --expert=boxes --weights=FastestDet.onnx \\
      --names=coco.names --data='shards/*.tar' --output=labels/boxes
  mtv-jax match_boxes --labels=labels/boxes --truth=labels/truth \\
      --rename sofa=couch tvmonitor=tv --phrases=10

Both sets label the same shards. mtv_jax/experts/labelling/box_matching.py
defines which boxes match.
"""

import argparse
import json

from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.experts.labelling import box_matching
from mtv_jax.utils import atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax match_boxes`."""
  add = parser.add_argument
  add("--labels", required=True, help="the label set of an expert")
  add("--truth", required=True, help="the label set of annotated boxes")
  add("--iou", type=float, default=0.5, help="minimum IoU of a match")
  add(
    "--rename",
    nargs="+",
    default=[],
    metavar="LABEL=TRUTH",
    help="the annotations' name of an expert's phrase",
  )
  add("--phrases", type=int, default=0, help="number of phrases to list")
  add("--json", help="file to write")


def run(args: argparse.Namespace) -> None:
  """Compares the sets and prints the table."""
  agreement = box_matching.compare(
    LabelSet(args.labels, kind="boxes"),
    LabelSet(args.truth, kind="boxes"),
    iou=args.iou,
    renamed=box_matching.parse_renamed(args.rename),
  )
  if args.json:
    text = json.dumps(agreement.to_dict(), indent=1) + "\n"
    atomic.write_text(args.json, text)
  print(f"{agreement.images:,} images with true boxes, IoU >= {args.iou:g}")
  if agreement.unlabelled:
    print(f"{agreement.unlabelled:,} of them have no label")
  print(agreement.table(phrases=args.phrases))
  if never := agreement.never_true:
    print(f"in no true box: {', '.join(never)}")
