"""Grounding: region-text retrieval, box classification, phrase localisation.

With z_a the embedding of region a, t_p that of distinct phrase p, and w_c the
zero-shot vector of class c (see `zero_shot.py`), all of unit length:

    region to phrase  R@k = mean over regions a of  a's phrase in top-k z_a.t_p
    phrase to region  R@k = mean over phrases p of  any region of p in top-k
    box top-k             = mean over regions a of  a's class in top-k z_a.w_c
    located               = mean over (image, phrase) of  IoU >= 0.5 of the
                            predicted box with any of the phrase's boxes there

Boxes are the annotated ones, not detections. The protocols are our own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.classification import zero_shot
from mtv_jax.evals.core import base, examples, prompts, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import BoxSet, Data
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.grounding import region_features
from mtv_jax.evals.retrieval import retrieval
from mtv_jax.utils import plots
from mtv_jax.utils.errors import InputError, check_choice

# Images whose phrases are located at a time.
_CHUNK = 256
_FIXED_BOXES = 256
_IMAGE_SIZE = 320  # pixels a side on the sheet, so that names are legible


@dataclasses.dataclass(frozen=True)
class Grounding(Evaluator):
  """Region-text retrieval, box classification and phrase localisation.

  Attributes:
    data: see `datasets/registry.py`.
    images: the folder of COCO's images, where it is not beside the JSON.
    regions: how a box is embedded, see `region_features.py`; `auto` is the
      prompter of an encoder that has one, else `crop`.
    prompts: a file of templates for the classes (see `prompts.py`), and of
      other names for them, one a class in the data's order.
    locate: `auto` to locate phrases where the encoder has a locator, or `none`.
    count: images to use, evenly spaced; all by default (of the scenes 128).
    batch_size: images a step.
    pictures: images on the sheet.
  """

  data: Data = "scenes"
  images: str | None = None
  regions: str = "auto"
  prompts: str | None = None
  locate: str = "auto"
  count: int | None = None
  batch_size: int = 32
  pictures: int = 0

  def __post_init__(self):
    ways = ("auto", *region_features.WAYS)
    check_choice("grounding: regions", self.regions, ways)
    check_choice("grounding: locate", self.locate, ("auto", "none"))

  @functools.cached_property
  def _set(self) -> tuple[BoxSet, prompts.Prompts | None]:
    data = registry.open_boxes(self.data, images=self.images, count=self.count)
    if data.classes is None:
      return data, None
    named = prompts.Prompts(classes=data.classes)
    if self.prompts:
      named = prompts.read_prompts(self.prompts)
      if len(named.classes) != len(data.classes):
        raise InputError(
          f"{self.prompts} names {len(named.classes)} classes and {data.name} "
          f"has {len(data.classes)}; expected one name a class, in that order"
        )
    return data, named

  def prepare(self) -> None:
    """Reads the annotations, and caches them."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """Retrieval in both directions; accuracies with classes or a locator."""
    base.require_text(encoder)
    data, named = self._set
    way = region_features.resolve(encoder, self.regions)
    region = region_features.embed(
      encoder, data.images, data.boxes, way=way, batch_size=self.batch_size
    )
    matches = _retrieval(encoder, data, region)
    parts = [(matches.metrics, matches.chance)]
    if named is not None:
      parts.append(_classification(encoder, data, named, region))
    locates = self.locate == "auto" and encoder.can_predict("locator")
    if locates:
      parts.append(_localisation(encoder, data, self.batch_size))
    pictures = {}
    if self.pictures:
      pictures["regions"] = _sheet(data, matches, self.pictures)
    protocol = {
      **encoder.protocol(),
      **region_features.protocol(encoder, way),
      **_protocol(data, named, way, locates=locates),
      "phrases_distinct": len(matches.phrases),
    }
    metrics, chance = (
      {k: v for part in column for k, v in part.items()}
      for column in zip(*parts, strict=True)
    )
    return Result(metrics, protocol, chance, pictures=pictures)


def _protocol(
  data: BoxSet,
  named: prompts.Prompts | None,
  way: str,
  *,
  locates: bool,
) -> dict[str, Any]:
  protocol = {
    "data": data.name,
    "data_hash": data.digest,
    "images": len(data.images),
    "boxes": sum(map(len, data.boxes)),
    "boxes_left_out": data.left_out,
    "box_source": "annotations",
    "regions": way,
    "phrase_prompt": "none",
    "phrase_to_region": "hit if any region of the phrase is in the top k",
    "similarity": "cosine, float32, highest matmul precision",
    "ties": ranking.TIE_RULE,
  }
  if named is not None:
    protocol |= {
      "classes": len(named.classes),
      **named.protocol(),
      "mean_per_class": "over classes that have a box",
    }
  if locates:
    protocol |= {
      "located": "IoU >= 0.5 with any box of the phrase in the image",
      "located_chance": "the best single box to answer with always",
    }
  return protocol


# Metrics, and their chance.
_Metrics = tuple[dict[str, float], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class _Retrieval:
  """Metrics of retrieval and the embeddings that were compared."""

  metrics: dict[str, float]
  chance: dict[str, float]
  phrases: list[str]
  region: np.ndarray
  text: np.ndarray


def _retrieval(
  encoder: Encoder,
  data: BoxSet,
  region: Float32[np.ndarray, "r e"],
) -> _Retrieval:
  phrases, owner = retrieval.distinct_texts(
    [phrase for own in data.phrases for phrase in own]
  )
  text = normalize(encoder.text(phrases))
  # A distinct phrase and its regions are as an image and its captions.
  names = ("region_to_phrase", "phrase_to_region")
  return _Retrieval(
    retrieval.recalls(text, region, owner=owner, names=names),
    retrieval.chance(owner, names=names),
    phrases,
    region,
    text,
  )


def _classification(
  encoder: Encoder,
  data: BoxSet,
  named: prompts.Prompts,
  region: Float32[np.ndarray, "r e"],
) -> _Metrics:
  """Accuracies of the boxes' classes among all classes of the data."""
  figures, chance = zero_shot.class_accuracies(
    region,
    zero_shot.text_classifier(encoder, named),
    np.concatenate(data.labels),
  )
  return (
    {f"box_{k}": v for k, v in figures.items()},
    {f"box_{k}": v for k, v in chance.items()},
  )


def _localisation(encoder: Encoder, data: BoxSet, batch_size: int) -> _Metrics:
  """IoU of the predicted boxes of phrases, and of the best constant answer."""
  queries = [tuple(dict.fromkeys(own)) for own in data.phrases]
  boxes = []
  for start in range(0, len(queries), _CHUNK):
    chosen = range(start, min(start + _CHUNK, len(queries)))
    out = encoder.locate(
      examples.select_images(data.images, chosen),
      [queries[i] for i in chosen],
      batch_size=batch_size,
    )
    boxes += [out.boxes[k, : len(queries[i])] for k, i in enumerate(chosen)]
  best = best_overlaps(boxes, queries, data)
  floor = fixed_overlaps(fixed_answers(data), queries, data)
  return (
    {
      "located_iou50": float(np.mean(best >= 0.5)),
      "located_mean_iou": float(np.mean(best)),
    },
    {
      "located_iou50": float(np.max(np.mean(floor >= 0.5, axis=1))),
      "located_mean_iou": float(np.max(np.mean(floor, axis=1))),
    },
  )


def best_overlaps(
  boxes: Sequence[Float[np.ndarray, "_ 4"]],
  queries: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, " q"]:
  """The best IoU of each predicted box with a box of its phrase.

  Args:
    boxes: predicted, of each image one for each of its `queries`.
    queries: distinct phrases of each image.
    data: with all boxes and phrases of the images.
  """
  best = []
  for i, own in enumerate(queries):
    overlap = ious(boxes[i], data.boxes[i])  # [queries, boxes]
    best.append(np.where(_same(own, data.phrases[i]), overlap, 0).max(axis=1))
  return np.concatenate(best)


def fixed_overlaps(
  answers: Float[np.ndarray, "c 4"],
  queries: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, "c q"]:
  """`best_overlaps` of boxes each of which is the answer to every query."""
  best = []
  for i, own in enumerate(queries):
    overlap = ious(answers, data.boxes[i])[:, None]  # [c, 1, boxes]
    best.append(np.where(_same(own, data.phrases[i]), overlap, 0).max(axis=2))
  return np.concatenate(best, axis=1)


def _same(queries: Sequence[str], phrases: Sequence[str]) -> np.ndarray:
  return np.asarray([[p == q for p in phrases] for q in queries])


def fixed_answers(data: BoxSet) -> Float[np.ndarray, "c 4"]:
  """Constant answers: 256 of the set's boxes, and central ones."""
  own = examples.subsample(list(np.concatenate(data.boxes)), _FIXED_BOXES)
  sides = np.linspace(0.125, 1, 8)
  central = [
    (0.5 - h / 2, 0.5 - w / 2, 0.5 + h / 2, 0.5 + w / 2)
    for h in sides
    for w in sides
  ]
  return np.concatenate([np.stack(own), central])


def ious(
  a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
  """Intersection over union of boxes (y0, x0, y1, x1); 0 without area."""
  a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
  low = np.maximum(a[..., :2], b[..., :2])
  high = np.minimum(a[..., 2:], b[..., 2:])
  both = np.maximum(high - low, 0).prod(axis=-1)
  areas = [np.maximum(x[..., 2:] - x[..., :2], 0).prod(axis=-1) for x in (a, b)]
  union = areas[0] + areas[1] - both
  return np.where(union > 0, both / np.where(union > 0, union, 1), 0)


def _sheet(data: BoxSet, matches: _Retrieval, count: int) -> np.ndarray:
  """Images with their boxes, named by annotation and by top-1 phrase."""
  starts = np.cumsum([0, *map(len, data.boxes)])
  chosen = examples.subsample(range(len(data.images)), count)
  rows = []
  for i in chosen:
    own = slice(starts[i], starts[i + 1])
    best = np.argmax(matches.region[own] @ matches.text.T, axis=1)
    image = np.asarray(plots.fit_image(data.images[i], _IMAGE_SIZE))
    rows.append(
      [
        plots.draw_boxes(image, data.boxes[i], names)[0]
        for names in (data.phrases[i], [matches.phrases[k] for k in best])
      ]
    )
  return plots.image_grid(rows, titles=("annotated", "found"), size=_IMAGE_SIZE)
