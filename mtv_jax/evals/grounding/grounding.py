"""Grounding: which phrase says what is in a box, and where a phrase is.

With z_a the embedding of region a, t_p that of distinct phrase p, and w_c the
zero-shot vector of class c (see `zero_shot.py`), all of unit length:

    region to phrase  R@k = mean over regions a of  a's phrase in top-k z_a.t_p
    phrase to region  R@k = mean over phrases p of  any region of p in top-k
    box top-k             = mean over regions a of  a's class in top-k z_a.w_c
    located               = mean over (image, phrase) of  IoU >= 0.5 of the
                            predicted box with any of the phrase's boxes there

Boxes are the annotated ones; nothing is detected. The protocols are our own.
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
from mtv_jax.utils.errors import check_choice

# Images located in at a time.
_CHUNK = 256
_FIXED = 256
_PICTURE = 320  # pixels a side, so that names can be read


@dataclasses.dataclass(frozen=True)
class Grounding(Evaluator):
  """Region-text retrieval, box classification, and locating phrases.

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
    pictures: how many images the sheet of what was found shows.
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
        raise ValueError(
          f"{self.prompts} names {len(named.classes)} classes and {data.name} "
          f"has {len(data.classes)}; expected one name a class, in that order"
        )
    return data, named

  def prepare(self) -> None:
    """Reads the annotations, and keeps them."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """Retrieval both ways, accuracies where there are classes or a locator."""
    base.require_text(encoder)
    data, named = self._set
    way = region_features.resolve(encoder, self.regions)
    region = region_features.embed(
      encoder, data.images, data.boxes, way=way, batch_size=self.batch_size
    )
    found = _retrieval(encoder, data, region)
    metrics, chance = dict(found.metrics), dict(found.chance)
    if named is not None:
      classified = _classification(encoder, data, named, region)
      metrics |= classified.metrics
      chance |= classified.chance
    locates = self.locate == "auto" and encoder.can_predict("locator")
    if locates:
      located = _location(encoder, data, self.batch_size)
      metrics |= located.metrics
      chance |= located.chance
    pictures = {}
    if self.pictures:
      pictures["regions"] = _sheet(data, found, self.pictures)
    protocol = {
      **encoder.protocol(),
      **region_features.protocol(encoder, way),
      **_protocol(data, named, way, locates=locates),
      "phrases_distinct": len(found.phrases),
    }
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


@dataclasses.dataclass(frozen=True)
class _Found:
  """Figures, and for retrieval what was compared with what."""

  metrics: dict[str, float]
  chance: dict[str, float]
  phrases: tuple[str, ...] = ()
  region: np.ndarray | None = None
  text: np.ndarray | None = None


def _retrieval(
  encoder: Encoder,
  data: BoxSet,
  region: Float32[np.ndarray, "r e"],
) -> _Found:
  every = [phrase for own in data.phrases for phrase in own]
  phrases = tuple(dict.fromkeys(every))
  place = {phrase: i for i, phrase in enumerate(phrases)}
  text = normalize(encoder.text(list(phrases)))
  owner = np.asarray([place[phrase] for phrase in every], np.int32)
  # A distinct phrase is to its regions what an image is to its captions.
  names = {
    "text_to_image": "region_to_phrase",
    "image_to_text": "phrase_to_region",
  }

  def renamed(figures: dict[str, float]) -> dict[str, float]:
    return {
      f"{names[key.rsplit('_', 1)[0]]}_{key.rsplit('_', 1)[1]}": value
      for key, value in figures.items()
    }

  return _Found(
    renamed(retrieval.recalls(text, region, owner=owner)),
    renamed(retrieval.chance(owner)),
    phrases,
    region,
    text,
  )


def _classification(
  encoder: Encoder,
  data: BoxSet,
  named: prompts.Prompts,
  region: Float32[np.ndarray, "r e"],
) -> _Found:
  """Of each box the class, among all the classes of the data."""
  figures, chance = zero_shot.class_accuracies(
    region,
    zero_shot.text_classifier(encoder, named),
    np.concatenate(data.labels),
  )
  return _Found(
    {f"box_{k}": v for k, v in figures.items()},
    {f"box_{k}": v for k, v in chance.items()},
  )


def _location(encoder: Encoder, data: BoxSet, batch_size: int) -> _Found:
  asked = [tuple(dict.fromkeys(own)) for own in data.phrases]
  boxes = []
  for start in range(0, len(asked), _CHUNK):
    chosen = range(start, min(start + _CHUNK, len(asked)))
    out = encoder.locate(
      examples.select_images(data.images, chosen),
      [asked[i] for i in chosen],
      batch_size=batch_size,
    )
    boxes += [out.boxes[k, : len(asked[i])] for k, i in enumerate(chosen)]
  best = best_overlaps(boxes, asked, data)
  floor = fixed_overlaps(fixed_answers(data), asked, data)
  return _Found(
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
  asked: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, " q"]:
  """For each image and phrase asked, the best IoU with a box of the phrase.

  Args:
    boxes: of each image, one for each phrase asked.
    asked: of each image.
    data: with all boxes and phrases of the images.
  """
  best = []
  for i, own in enumerate(asked):
    same = np.asarray([[p == q for q in data.phrases[i]] for p in own])
    best.append(np.where(same, ious(boxes[i], data.boxes[i]), 0).max(axis=1))
  return np.concatenate(best)


def fixed_overlaps(
  answers: Float[np.ndarray, "c 4"],
  asked: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, "c q"]:
  """`best_overlaps` of boxes each of which is the answer to everything."""
  best = []
  for i, own in enumerate(asked):
    same = np.asarray([[p == q for q in data.phrases[i]] for p in own])
    overlap = ious(answers, data.boxes[i])[:, None]
    best.append(np.where(same, overlap, 0).max(axis=2))
  return np.concatenate(best, axis=1)


def fixed_answers(data: BoxSet) -> Float[np.ndarray, "c 4"]:
  """Boxes to answer always with: 256 of the set's own, and central ones."""
  own = examples.subsample(list(np.concatenate(data.boxes)), _FIXED)
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


def _sheet(data: BoxSet, found: _Found, count: int) -> np.ndarray:
  """Images with their boxes, as they are named and as the regions say."""
  starts = np.cumsum([0, *map(len, data.boxes)])
  chosen = examples.subsample(range(len(data.images)), count)
  rows = []
  for i in chosen:
    own = slice(starts[i], starts[i + 1])
    best = np.argmax(found.region[own] @ found.text.T, axis=1)
    image = np.asarray(plots.fit_image(data.images[i], _PICTURE))
    rows.append(
      [
        plots.draw_boxes(image, data.boxes[i], names)[0]
        for names in (data.phrases[i], [found.phrases[k] for k in best])
      ]
    )
  return plots.image_grid(rows, titles=("annotated", "found"), size=_PICTURE)
