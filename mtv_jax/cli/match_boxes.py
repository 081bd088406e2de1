"""Compares an expert's boxes with annotated ones: recall, precision, IoU.

  mtv-jax make_labels boxes --data='shards/*.tar' \\
      --output=labels/truth --instances instances_val2017.json
  mtv-jax label --expert=boxes --weights=FastestDet.onnx \\
      --names=coco.names --data='shards/*.tar' --output=labels/boxes
  mtv-jax match_boxes --labels=labels/boxes --truth=labels/truth \\
      --rename sofa=couch tvmonitor=tv --phrases=10

Both label sets must belong to one set of shards. Matching is defined in
mtv_jax/experts/labelling/box_matching.py.
"""

import json as json_lib
from collections.abc import Sequence

from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.experts.labelling import box_matching
from mtv_jax.utils import atomic


def run(
  labels: str,
  truth: str,
  iou: float = 0.5,
  rename: Sequence[str] = (),
  phrases: int = 0,
  json: str | None = None,
) -> None:
  """Compares the sets and prints the table.

  Args:
    labels: folder of the expert's label set.
    truth: folder of the annotated label set.
    iou: minimum IoU of a match.
    rename: LABEL=TRUTH maps an expert's phrase to the annotations' name.
    phrases: number of phrases to list.
    json: also write the result to this file.
  """
  agreement = box_matching.compare(
    LabelSet(labels, kind="boxes"),
    LabelSet(truth, kind="boxes"),
    iou=iou,
    renamed=box_matching.parse_renamed(rename),
  )
  if json:
    text = json_lib.dumps(agreement.to_dict(), indent=1) + "\n"
    atomic.write_text(json, text)
  print(f"{agreement.images:,} images with true boxes, IoU >= {iou:g}")
  if agreement.unlabelled:
    print(f"{agreement.unlabelled:,} of them have no label")
  print(agreement.table(phrases=phrases))
  if never := agreement.never_true:
    print(f"in no true box: {', '.join(never)}")
