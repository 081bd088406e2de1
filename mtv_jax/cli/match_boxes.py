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
    labels: the label set of an expert.
    truth: the label set of annotated boxes.
    iou: minimum IoU of a match.
    rename: LABEL=TRUTH, the annotations' name of an expert's phrase.
    phrases: number of phrases to list.
    json: file to write.
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
