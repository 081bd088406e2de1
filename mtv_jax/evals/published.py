"""Published figures of released checkpoints, and our matching metrics.

Table 5 of MTV's paper ("Revisiting Multi-Task Visual Representation Learning",
arXiv 2601.13886) is in percent and metres. Its zero-shot and retrieval columns
follow CLIP_benchmark and big_vision. Heads and input sizes of the other columns
are unpublished, so their figures are only a rough guide. Figures from the
authors are listed by checkpoint; figures from the SigLIP 2 table and DINOv2's
model card were checked against their sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

SIZES = ("base", "large")


class Reference(NamedTuple):
  """A row of Table 5, with figures by column."""

  name: str
  size: str
  checkpoint: str  # Hugging Face id
  figures: dict[str, float]


class Figure(NamedTuple):
  """A published figure of a checkpoint."""

  value: float  # In percent or metres.
  source: str
  protocol: str  # in words
  # Entries of our protocol that match the published protocol.
  entries: Mapping[str, Any]


class Column(NamedTuple):
  """Our metric that a published figure is compared with.

  `required` are protocol entries that identify the data. Tuples and ranges list
  alternatives; None matches a missing entry.
  """

  evaluation: str
  metric: str
  label: str  # for charts
  required: Mapping[str, Any]


def _row(name: str, size: str, checkpoint: str, *values: float) -> Reference:
  figures = dict(zip(TABLE_5, values, strict=True))
  return Reference(name, size, checkpoint, figures)


# Karpathy's file has splits; COCO's own file lacks them.
_COCO = {"images": 5000, "captions": 25_010, "split": (None, "test")}
_NYU_DEPTH = ("raw, mm", "raw (rawDepths), float32")
_NYU = {"images": 654, "crop": "nyu_eigen", "depth": _NYU_DEPTH}

_IMAGENET = {"images": 50_000, "classes": 1000}
_IMAGENET_SPLITS = {**_IMAGENET, "train_images": 1_281_167}
_ADE20K = {"images": 2000, "classes": 150, "train_split": "train"}
# The number of pairs depends on a random draw; 500 or more is the full set.
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
# Without the VQA column, which evaluates more than the encoder.
TABLE_5 = ("imagenet", "coco_t2i", "coco_i2t", "ade20k", "navi", "spair", "nyu")

REFERENCES = (
  _row("CLIP B/16", "base", "openai/clip-vit-base-patch16",
       68.3, 33.1, 52.4, 42.2, 36.9, 15.9, 0.603),
  _row("SigLIP B/16", "base", "google/siglip-base-patch16-224",
       76.2, 47.2, 64.5, 45.1, 38.5, 17.3, 0.615),
  _row("SigLIP 2 B/16", "base", "google/siglip2-base-patch16-224",
       78.2, 52.1, 68.9, 46.0, 38.0, 20.8, 0.562),
  _row("MTV B/16", "base", "Becomebright/MTV-base-patch16-224",
       69.5, 41.2, 57.1, 44.6, 43.8, 28.4, 0.469),
  _row("CLIP L/14", "large", "openai/clip-vit-large-patch14",
       75.5, 36.5, 56.3, 46.2, 36.0, 20.5, 0.588),
  _row("SigLIP L/16", "large", "google/siglip-large-patch16-256",
       80.5, 51.2, 69.6, 47.7, 38.8, 19.7, 0.550),
  _row("SigLIP 2 L/16", "large", "google/siglip2-large-patch16-256",
       82.5, 54.7, 71.5, 51.6, 43.2, 29.9, 0.484),
  _row("MTV L/16", "large", "Becomebright/MTV-large-patch16-256",
       75.2, 43.0, 58.1, 48.2, 45.0, 30.1, 0.414),
)  # fmt: skip


def matching_column(
  evaluation: str, metric: str, protocol: Mapping[str, Any]
) -> str | None:
  """Name of the column that matches our metric and data, if any."""
  for name, column in COLUMNS.items():
    if column[:2] == (evaluation, metric) and all(
      protocol.get(k) in (v if isinstance(v, tuple | range) else (v,))
      for k, v in column.required.items()
    ):
      return name
  return None


_UNKNOWN = "not published: its head, layers or input size"
_SQUASHED = (
  "big_vision's: squashed without antialiasing, in lower case and without "
  "punctuation"
)
_CLIP_VIEW = "open_clip's, the figure's source: shorter side, center crop"
_CANONICAL = {"view": "squash_center", "clean": "canonicalize"}
_TABLE_5 = "Table 5 of arXiv 2601.13886"
_SIGLIP_2 = "big_vision's README_siglip2.md"
_DINOV2 = "MODEL_CARD.md of facebookresearch/dinov2"
_DINOV2_README = "README.md of facebookresearch/dinov2"
_DINOV3 = "MODEL_CARD.md of facebookresearch/dinov3"


def _make_table_5_figure(column: str, value: float, name: str) -> Figure:
  """Builds the figure of a table cell; `name` is the row."""
  protocol, entries = _UNKNOWN, {}
  if column in TABLE_5[:3]:
    protocol = "not published"
    if name.startswith("CLIP"):
      protocol, entries = _CLIP_VIEW, {"view": "open_clip"}
    elif name.startswith("SigLIP"):
      protocol, entries = f"presumably {_SQUASHED}", _big_vision_entries(column)
  return Figure(value, _TABLE_5, protocol, entries)


def _big_vision_entries(column: str) -> Mapping[str, Any]:
  return _CANONICAL if column == "imagenet" else {"view": "squash"}


def _siglip_2(*values: float) -> dict[str, Figure]:
  return {
    column: Figure(value, _SIGLIP_2, _SQUASHED, _big_vision_entries(column))
    for column, value in zip(TABLE_5[:3], values, strict=True)
  }


def _dinov2(knn: float, linear: float, nyu: float, ade20k: float):
  figures = _dinov2_registers(knn, linear, source=_DINOV2)
  protocol = "four layers, a linear head (lin4)"
  figures["nyu"] = Figure(nyu, _DINOV2, protocol, {"protocol": "lin4"})
  protocol = "four layers, a linear head, several scales (+ms)"
  figures["ade20k"] = Figure(ade20k, _DINOV2, protocol, {})
  return figures


def _dinov2_registers(knn, linear, *, source=_DINOV2_README):
  entries = {"view": "center"}
  knn_protocol = "resized to 256, center crop of 224; k is not stated"
  linear_protocol = "12,500 steps of 1,024 random crops, the best of its heads"
  return {
    "knn": Figure(knn, source, knn_protocol, entries),
    "linear": Figure(linear, source, linear_protocol, entries),
  }


def _dinov3(ade20k: float, nyu: float, navi: float, spair: float):
  probe_protocol = "a linear head on the last layer"
  match_protocol = "its averaging and input size are not stated there"
  return {
    "ade20k": Figure(ade20k, _DINOV3, probe_protocol, {}),
    "nyu": Figure(nyu, _DINOV3, probe_protocol, {"protocol": "linear"}),
    "navi": Figure(navi, _DINOV3, match_protocol, {}),
    "spair": Figure(spair, _DINOV3, match_protocol, {}),
  }


_BY_AUTHORS = {
  "google/siglip2-base-patch16-224": _siglip_2(78.2, 52.1, 68.9),
  "google/siglip2-base-patch16-256": _siglip_2(79.1, 53.2, 69.7),
  "google/siglip2-base-patch16-384": _siglip_2(80.6, 54.6, 71.4),
  "google/siglip2-base-patch16-512": _siglip_2(81.2, 55.2, 71.2),
  "google/siglip2-base-patch32-256": _siglip_2(74.0, 47.2, 63.7),
  "google/siglip2-large-patch16-256": _siglip_2(82.5, 54.7, 71.5),
  "google/siglip2-large-patch16-384": _siglip_2(83.1, 55.3, 71.4),
  "google/siglip2-large-patch16-512": _siglip_2(83.5, 55.2, 72.1),
  "google/siglip2-so400m-patch14-224": _siglip_2(83.2, 55.1, 71.5),
  "google/siglip2-so400m-patch14-384": _siglip_2(84.1, 55.8, 71.7),
  "google/siglip2-so400m-patch16-256": _siglip_2(83.4, 55.4, 71.5),
  "google/siglip2-so400m-patch16-384": _siglip_2(84.1, 56.0, 71.2),
  "google/siglip2-so400m-patch16-512": _siglip_2(84.3, 56.0, 71.3),
  "google/siglip2-giant-opt-patch16-256": _siglip_2(84.5, 55.7, 72.5),
  "google/siglip2-giant-opt-patch16-384": _siglip_2(85.0, 56.1, 72.8),
  "facebook/dinov2-small": _dinov2(79.0, 81.1, 0.417, 47.2),
  "facebook/dinov2-base": _dinov2(82.1, 84.5, 0.362, 51.3),
  "facebook/dinov2-large": _dinov2(83.5, 86.3, 0.333, 53.1),
  "facebook/dinov2-giant": _dinov2(83.5, 86.5, 0.298, 53.0),
  "facebook/dinov2-with-registers-small": _dinov2_registers(79.1, 80.9),
  "facebook/dinov2-with-registers-base": _dinov2_registers(82.0, 84.6),
  "facebook/dinov2-with-registers-large": _dinov2_registers(83.8, 86.7),
  "facebook/dinov2-with-registers-giant": _dinov2_registers(83.7, 87.1),
  "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(47.0, 0.403, 56.3, 50.4),
  "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(51.8, 0.373, 58.8, 57.2),
  "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(54.9, 0.352, 62.3, 61.3),
}

# By Hugging Face id and column.
FIGURES: dict[str, dict[str, Figure]] = {
  row.checkpoint: {
    column: _make_table_5_figure(column, value, row.name)
    for column, value in row.figures.items()
  }
  for row in REFERENCES
}
for _checkpoint, _figures in _BY_AUTHORS.items():
  FIGURES.setdefault(_checkpoint, {}).update(_figures)
