"""Table 5 of MTV's paper, and the metrics and data that it is beside.

The table of "Revisiting Multi-Task Visual Representation Learning" (arXiv
2601.13886) is in percent and metres, beside our results on the same whole data
set. Its zero-shot and retrieval columns follow CLIP_benchmark and big_vision;
the heads and sizes of the others are not published, so those figures are for
orientation. `published.py` has more, by checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SIZES = ("base", "large")


class Reference(NamedTuple):
  """A row of the table; its figures by column."""

  name: str
  size: str
  checkpoint: str  # its id on the Hugging Face hub
  figures: dict[str, float]


class Column(NamedTuple):
  """Our metric that a published one is compared with.

  `required` are protocol entries that identify the data; tuples and ranges list
  alternatives, None among them for a protocol without the entry.
  """

  evaluation: str
  metric: str
  label: str  # for a chart
  required: Mapping[str, Any]


def _row(name: str, size: str, checkpoint: str, *values: float) -> Reference:
  figures = dict(zip(TABLE_5, values, strict=True))
  return Reference(name, size, checkpoint, figures)


# Karpathy's file has splits, COCO's own has none.
_COCO = {"images": 5000, "captions": 25_010, "split": (None, "test")}
_NYU_DEPTH = ("raw, mm", "raw (rawDepths), float32")
_NYU = {"images": 654, "crop": "nyu_eigen", "depth": _NYU_DEPTH}

_IMAGENET = {"images": 50_000, "classes": 1000}
_IMAGENET_SPLITS = {**_IMAGENET, "train_images": 1_281_167}
_ADE20K = {"images": 2000, "classes": 150, "train_split": "train"}
# The number of pairs depends on a random draw: 500 are not a subset.
_NAVI = {"dataset": "NAVI", "subset": "wild_set", "pairs": range(500, 10**9)}
_SPAIR = {"dataset": "SPair-71k", "split": "test", "classes": 18}
_SPAIR |= {"threshold": 0.1}

COLUMNS = {
  "imagenet": Column("zero_shot", "top1", "ImageNet zero-shot", _IMAGENET),
  "coco_t2i": Column(
    "retrieval", "text_to_image_r1", "COCO text to image R@1", _COCO
  ),
  "coco_i2t": Column(
    "retrieval", "image_to_text_r1", "COCO image to text R@1", _COCO
  ),
  "ade20k": Column("segmentation", "miou", "ADE20K mIoU", _ADE20K),
  "navi": Column(
    "geometric_correspondence", "avg_recall", "NAVI recall", _NAVI
  ),
  "spair": Column("semantic_correspondence", "recall", "SPair recall", _SPAIR),
  "nyu": Column("depth_probe", "rmse", "NYUv2 RMSE", _NYU),
  "knn": Column("knn", "top1_k20", "ImageNet k-NN", _IMAGENET_SPLITS),
  "linear": Column(
    "linear_probe", "top1", "ImageNet linear probe", _IMAGENET_SPLITS
  ),
}
# Without the VQA column, which evaluates more than an encoder.
TABLE_5 = ("imagenet", "coco_t2i", "coco_i2t", "ade20k", "navi", "spair", "nyu")

REFERENCES = (
  _row(
    "CLIP B/16", "base", "openai/clip-vit-base-patch16",
    68.3, 33.1, 52.4, 42.2, 36.9, 15.9, 0.603,
  ),
  _row(
    "SigLIP B/16", "base", "google/siglip-base-patch16-224",
    76.2, 47.2, 64.5, 45.1, 38.5, 17.3, 0.615,
  ),
  _row(
    "SigLIP 2 B/16", "base", "google/siglip2-base-patch16-224",
    78.2, 52.1, 68.9, 46.0, 38.0, 20.8, 0.562,
  ),
  _row(
    "MTV B/16", "base", "Becomebright/MTV-base-patch16-224",
    69.5, 41.2, 57.1, 44.6, 43.8, 28.4, 0.469,
  ),
  _row(
    "CLIP L/14", "large", "openai/clip-vit-large-patch14",
    75.5, 36.5, 56.3, 46.2, 36.0, 20.5, 0.588,
  ),
  _row(
    "SigLIP L/16", "large", "google/siglip-large-patch16-256",
    80.5, 51.2, 69.6, 47.7, 38.8, 19.7, 0.550,
  ),
  _row(
    "SigLIP 2 L/16", "large", "google/siglip2-large-patch16-256",
    82.5, 54.7, 71.5, 51.6, 43.2, 29.9, 0.484,
  ),
  _row(
    "MTV L/16", "large", "Becomebright/MTV-large-patch16-256",
    75.2, 43.0, 58.1, 48.2, 45.0, 30.1, 0.414,
  ),
)  # fmt: skip


def matching_column(
  evaluation: str, metric: str, protocol: Mapping[str, Any]
) -> str | None:
  """The name of the column with the same metric on the same data, if any."""
  for name, column in COLUMNS.items():
    if column[:2] == (evaluation, metric) and all(
      protocol.get(k) in (v if isinstance(v, tuple | range) else (v,))
      for k, v in column.required.items()
    ):
      return name
  return None
