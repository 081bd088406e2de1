"""Grounding: region-text retrieval, box classification, phrase localisation.

With unit vectors z_a (region a), t_p (distinct phrase p) and w_c (zero-shot
vector of class c, see `zero_shot.py`):

    region to phrase  R@k = mean over regions a of  a's phrase in top-k z_a.t_p
    phrase to region  R@k = mean over phrases p of  any region of p in top-k
    box top-k             = mean over regions a of  a's class in top-k z_a.w_c
    located               = mean over (image, phrase) of  IoU >= 0.5 of the
                            predicted box with any of the phrase's boxes

Boxes are annotated, not detected. These protocols are ours.

Referring expressions (RefCOCO, RefCOCO+, RefCOCOg) describe one box each:

    located  = mean over expressions of  IoU >= 0.5 of the predicted box with
               the described box, as published
    chosen   = the same for the annotated box of the image with the largest
               cosine (ground-truth proposals, as in MAttNet, Yu et al. 2018)

Detection (`detect`) locates every class in every image, scores the box by its
region's cosine with the class, and is evaluated as COCO (`average_precision`).
The locator predicts one box per phrase, which bounds the recall.

Three methods embed a region in the text space:

  prompter   the region prompter, trained by the grounding objective
  pool       the mean patch, weighted by the box's coverage of each patch; for
             encoders with mean pooling
  crop       the box's pixels, warped to a square and encoded as an image
             (R-CNN, Girshick et al. 2014); for any encoder with a text tower
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals import retrieval
from mtv_jax.evals.classification import zero_shot
from mtv_jax.evals.core import base, bootstrap, examples, prompts, ranking
from mtv_jax.evals.core.average_precision import average_precision
from mtv_jax.evals.core.base import Evaluator, NotApplicable, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import BoxSet, Data, LazySequence
from mtv_jax.evals.datasets import registry
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils import plots

_CHUNK = 256  # images per call of the encoder
_FIXED_BOXES = 256


@dataclasses.dataclass(frozen=True)
class GroundingEvaluator(Evaluator):
  """Region-text retrieval, box classification and phrase localisation.

  Attributes:
    regions: how boxes are embedded, see above; `auto` is `prompter` if the
      encoder has one, else `crop`.
    prompts: a file of templates (see `prompts.py`) and class names, one per
      class in the data's order.
    locate: `auto` to locate phrases if the encoder has a locator, or `none`.
    detect: adds the average precision of located classes; needs a locator and
      a prompter.
    split: RefCOCO split: `val`, `testA`, `testB` or `test` (all test splits).
  """

  data: Data = "scenes"
  images: str | None = None
  regions: Literal["auto", "prompter", "pool", "crop"] = "auto"
  prompts: str | None = None
  locate: Literal["auto", "none"] = "auto"
  detect: bool = False
  split: str = "val"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 32
  pictures: NonNegativeInt = 0

  @property
  def requires(self) -> frozenset[str]:
    """What the encoder needs, see the base class."""
    prompter = {"grounding"} if self.regions == "prompter" else set()
    return frozenset({"text"} | prompter)

  @functools.cached_property
  def _set(self) -> tuple[BoxSet, prompts.Prompts | None]:
    data = registry.open_boxes(
      self.data, images=self.images, split=self.split, count=self.count
    )
    if data.classes is None:
      return data, None
    names = prompts.Prompts(classes=data.classes)
    if self.prompts:
      names = prompts.read_prompts(self.prompts, classes=len(data.classes))
    return data, names

  def run(self, encoder: Encoder) -> Result:
    """Retrieval in both directions; box and locator accuracies if available."""
    base.require_text(encoder)
    data, _ = self._set
    method = resolve_regions(encoder, self.regions)
    has_locator = encoder.can_predict("locator")
    if self.detect and not (has_locator and method == "prompter"):
      raise NotApplicable(
        "detect=True needs the locator and the prompter of a run that trained "
        "grounding with box regression"
      )
    protocol = {
      **encoder.protocol(),
      **regions_preprocess(encoder, method),
      **data.protocol(),
      "boxes": sum(map(len, data.boxes)),
      "boxes_left_out": data.left_out,
      "box_source": "annotations",
      "regions": method,
      "phrase_prompt": "none",
      "phrase_length": encoder.phrase_length if method == "prompter" else None,
      "similarity": "cosine, float32, highest matmul precision",
    }
    candidates = data.boxes if data.candidates is None else data.candidates
    options = {"method": method, "batch_size": self.batch_size}
    region = embed_regions(encoder, data.images, candidates, **options)
    # The prompter was trained with its own phrase length.
    embed = encoder.phrases if method == "prompter" else encoder.text
    phrases, index = retrieval.distinct_texts(
      [phrase for image_phrases in data.phrases for phrase in image_phrases]
    )
    text = normalize(embed(phrases))
    sheets = {}
    if data.candidates is not None:
      estimate, chance, extra = _choose_box(data, region, text[index])
    else:
      estimate, chance, extra = self._score_regions(region, text, index, embed)
      if self.pictures:
        sheet = _draw_sheet(data, region, text, phrases, count=self.pictures)
        sheets["regions"] = sheet
    if self.locate == "auto" and has_locator:
      located, located_chance = _locate_phrases(encoder, data, self.batch_size)
      estimate |= located
      chance |= located_chance
      extra = {
        "located": "IoU >= 0.5 with any box of the phrase in the image",
        "located_chance": "the best constant box",
        **extra,
      }
    if self.detect:
      estimate |= Estimate(self._detect(encoder), {})
      extra |= {"detected": "one box per class and image, scored by its cosine"}
    return Result.from_estimate(
      estimate, protocol | extra, chance, sheets=sheets
    )

  def _score_regions(self, region, text, owner, embed) -> _Scores:
    """Scores region-text retrieval and box classification.

    `text` embeds distinct phrases; `owner` is the phrase index of each region.
    """
    data, class_prompts = self._set
    protocol = {
      "phrase_to_region": "hit if any region of the phrase is in the top k",
      "ties": ranking.TIE_RULE,
      "phrases_distinct": len(text),
    }
    # As image-caption retrieval, with a distinct phrase as the "image".
    names = ("region_to_phrase", "phrase_to_region")
    image = np.repeat(np.arange(len(data.boxes)), [*map(len, data.boxes)])
    estimate = retrieval.recalls(text, region, owner, names=names, groups=image)
    chance = retrieval.chance(owner, names=names)
    if class_prompts is not None:
      classifier = zero_shot.text_classifier(embed, class_prompts)
      labels = np.concatenate(data.labels)
      accuracies, box_chance = zero_shot.class_accuracies(
        region, classifier, labels, groups=image
      )
      estimate |= accuracies.rename("box_{}")
      chance |= {f"box_{name}": value for name, value in box_chance.items()}
      protocol |= {
        "classes": len(class_prompts.classes),
        **class_prompts.protocol(),
        "mean_per_class": "over classes that have a box",
      }
    return estimate, chance, protocol

  def _detect(self, encoder: Encoder) -> dict[str, float]:
    """Average precision of one box per class and image."""
    data, class_prompts = self._set
    if class_prompts is None:
      raise NotApplicable(f"{data.name} has no classes to detect")
    count = len(data.images)
    names = [class_prompts.classes] * count
    boxes = predict_boxes(encoder, data.images, names, self.batch_size)
    boxes = [np.clip(b, 0, 1).astype(np.float32) for b in boxes]
    region = embed_regions(
      encoder, data.images, boxes, method="prompter", batch_size=self.batch_size
    ).reshape(count, len(class_prompts.classes), -1)
    classifier = zero_shot.text_classifier(encoder.phrases, class_prompts)
    return average_precision(
      [ious(b, truth) for b, truth in zip(boxes, data.boxes, strict=True)],
      list(np.sum(region * classifier, axis=-1)),
      [np.arange(len(class_prompts.classes))] * count,
      data.labels,
    )


# Metrics, chance and protocol.
_Scores = tuple[Estimate, dict[str, float], dict[str, Any]]


def _choose_box(data: BoxSet, region: np.ndarray, text: np.ndarray) -> _Scores:
  """Scores the choice of an annotated box for each referring expression.

  `region` and `text` embed candidates and expressions, image by image.
  """
  ranking.check_finite(regions=region, expressions=text)
  counts = [*map(len, data.boxes)]
  ends = np.cumsum([*map(len, data.candidates)])[:-1]
  texts = np.split(text, np.cumsum(counts)[:-1])
  rows = zip(data.candidates, np.split(region, ends), texts, strict=True)
  best_boxes = [boxes[np.argmax(r @ t.T, axis=0)] for boxes, r, t in rows]
  hits = best_overlaps(best_boxes, data.phrases, data) >= 0.5
  image = np.repeat(np.arange(len(counts)), counts)
  estimate = bootstrap.means({"chosen_iou50": hits}, groups=image)
  pairs = zip(data.boxes, data.candidates, strict=True)
  correct_shares = [
    (ious(true_boxes, boxes) >= 0.5).mean(axis=1) for true_boxes, boxes in pairs
  ]
  chance = {"chosen_iou50": float(np.concatenate(correct_shares).mean())}
  return (
    estimate,
    chance,
    {
      "candidates": len(region),
      "chosen": "among all annotated boxes of the image",
      "located": "IoU >= 0.5 with the described box",
    },
  )


def _locate_phrases(
  encoder: Encoder, data: BoxSet, batch_size: int
) -> tuple[Estimate, dict[str, float]]:
  """Scores the predicted boxes of phrases; chance is the best constant box."""
  queries = data.phrases
  if data.candidates is None:
    queries = [tuple(dict.fromkeys(names)) for names in queries]
  boxes = predict_boxes(encoder, data.images, queries, batch_size)
  answers = make_constant_answers(data)[:, None]

  def score(predicted):
    best = best_overlaps(predicted, queries, data)
    return {"located_iou50": best >= 0.5, "located_mean_iou": best}

  image = np.repeat(np.arange(len(queries)), [*map(len, queries)])
  constant_scores = score([answers] * len(queries))
  chance = {k: float(v.mean(axis=1).max()) for k, v in constant_scores.items()}
  return bootstrap.means(score(boxes), groups=image), chance


def predict_boxes(
  encoder: Encoder,
  images: Sequence[Any],
  queries: Sequence[Sequence[str]],
  batch_size: int,
) -> list[Float[np.ndarray, "_ 4"]]:
  """The locator's box of each query, one array per image."""
  boxes = []
  for chunk in _split_chunks(len(queries)):
    texts = [queries[i] for i in chunk]
    part = examples.select_images(images, chunk)
    out = encoder.locate(part, texts, batch_size=batch_size)
    boxes += [out.boxes[k, : len(row)] for k, row in enumerate(texts)]
  return boxes


def best_overlaps(
  boxes: Sequence[Float[np.ndarray, "*answers _ 4"]],
  queries: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, "*answers q"]:
  """Best IoU of each predicted box with a box of its phrase.

  `boxes` has, per image, one box per query (distinct phrase), or one box for
  all queries. Referring expressions have one box each.
  """
  best = []
  rows = zip(boxes, queries, data.boxes, data.phrases, strict=True)
  for predicted, texts, truth, phrases in rows:
    same = np.asarray(texts, object)[:, None] == np.asarray(phrases, object)
    if data.candidates is not None:
      same = np.eye(len(texts), dtype=bool)
    best.append(np.where(same, ious(predicted, truth), 0).max(axis=-1))
  return np.concatenate(best, axis=-1)


def make_constant_answers(data: BoxSet) -> Float[np.ndarray, "c 4"]:
  """Makes constant answers: 256 boxes of the set, and centred boxes."""
  annotated = examples.subsample(list(np.concatenate(data.boxes)), _FIXED_BOXES)
  sides = np.linspace(0.125, 1, 8)
  centred = [
    (0.5 - h / 2, 0.5 - w / 2, 0.5 + h / 2, 0.5 + w / 2)
    for h in sides
    for w in sides
  ]
  return np.concatenate([np.stack(annotated), centred])


def ious(
  a: Float[np.ndarray, "*n 4"], b: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "*n m"]:
  """Intersection over union of boxes (y0, x0, y1, x1); 0 if both are empty."""
  a, b = np.asarray(a, np.float64)[..., None, :], np.asarray(b, np.float64)
  low = np.maximum(a[..., :2], b[..., :2])
  high = np.minimum(a[..., 2:], b[..., 2:])
  intersection = np.maximum(high - low, 0).prod(axis=-1)
  areas = [np.maximum(x[..., 2:] - x[..., :2], 0).prod(axis=-1) for x in (a, b)]
  union = areas[0] + areas[1] - intersection
  return np.where(union > 0, intersection / np.where(union > 0, union, 1), 0)


def _draw_sheet(data, region, text, phrases, *, count: int) -> np.ndarray:
  """Images with boxes, labelled by annotation and by top-1 phrase."""
  starts = np.cumsum([0, *map(len, data.boxes)])
  rows = []
  for i in examples.subsample(range(len(data.images)), count):
    scores = region[starts[i] : starts[i + 1]] @ text.T
    top = [phrases[k] for k in np.argmax(scores, axis=1)]
    image = np.asarray(plots.fit_image(data.images[i], plots.HALF))
    draw = functools.partial(
      plots.draw_boxes, image, data.boxes[i], size=plots.SHEET_TEXT - 3
    )
    rows.append([draw(labels)[0] for labels in (data.phrases[i], top)])
  return plots.image_grid(rows, titles=("annotated", "top 1"))


def resolve_regions(encoder: Encoder, method: str) -> str:
  """Resolves `auto`; raises NotApplicable if the encoder lacks the method."""
  has_prompter = encoder.can_predict("grounding")
  if method == "auto":
    return "prompter" if has_prompter else "crop"
  if method == "prompter" and not has_prompter:
    raise NotApplicable(
      "this encoder has no prompter, which the objective 'grounding' trains; "
      "regions='crop' works with any encoder"
    )
  spec = encoder.spec.image
  if method == "pool" and (spec.pool != "mean" or spec.pool_norm):
    norm = ", then a norm" if spec.pool_norm else ""
    raise NotApplicable(
      f"this encoder pools by {spec.pool!r}{norm}, so its patches are "
      "not in the space of its texts; regions='crop' works with any encoder"
    )
  return method


def regions_preprocess(encoder: Encoder, method: str) -> dict[str, Any]:
  """Preprocessing of `embed_regions`, for the protocol."""
  if not hasattr(encoder, "preprocess"):
    return {}
  # The prompter uses the encoder's preprocessing.
  view = encoder if method == "prompter" else _with_squash(encoder)
  source = "the box's pixels" if method == "crop" else "the whole image"
  return {"preprocess": {**view.preprocess.to_dict(), "of": source}}


def embed_regions(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[Float32[np.ndarray, "_ 4"]],
  *,
  method: str,
  batch_size: int = 32,
) -> Float32[np.ndarray, "r e"]:
  """Normalised embeddings of all boxes, image by image.

  `boxes` has one array of (y0, x0, y1, x1) in the unit square per image;
  `method` is `prompter`, `pool` or `crop`.
  """
  if method == "crop":
    return _embed_crops(encoder, images, boxes, batch_size)
  embeddings = []
  for chunk in _split_chunks(len(images)):
    part = examples.select_images(images, chunk)
    image_boxes = [boxes[i] for i in chunk]
    if method == "prompter":
      regions = encoder.ground(part, image_boxes, batch_size=batch_size)
      embeddings.append(regions.embeddings[regions.valid])
    else:
      embeddings.append(_pool_patches(encoder, part, image_boxes, batch_size))
  return np.concatenate(embeddings)


def _pool_patches(encoder, images, boxes, batch_size) -> np.ndarray:
  # Squashed, so that the unit square is the whole image.
  options = {"outputs": ("patches",), "batch_size": batch_size}
  features = _with_squash(encoder).image(images, **options)
  rows = []
  for grid, corners in zip(features.patches, boxes, strict=True):
    wy = coverage(corners[:, 0], corners[:, 2], grid.shape[0])
    wx = coverage(corners[:, 1], corners[:, 3], grid.shape[1])
    total = np.einsum("by,bx,yxd->bd", wy, wx, grid, optimize=True)
    rows.append(total / (wy.sum(1) * wx.sum(1))[:, None])
  pooled = np.concatenate(rows).astype(np.float32)
  if encoder.spec.image.projection is not None:
    kernel = encoder.params["image"]["projection"]["kernel"]
    # On a pod, each host has a shard.
    replicated = replicated_sharding(encoder.mesh)
    kernel = jax.jit(lambda x: x, out_shardings=replicated)(kernel)
    pooled = pooled @ np.asarray(kernel)
  return normalize(pooled)


def coverage(
  low: Float32[np.ndarray, " b"], high: Float32[np.ndarray, " b"], count: int
) -> np.ndarray:
  """Coverage of `count` equal cells by the intervals [low, high], `[b, count]`.

  An empty interval still covers a positive fraction of its cell.
  """
  cells = np.arange(count)
  low = np.clip(np.asarray(low, np.float64)[:, None] * count, 0, count - 1e-6)
  high = np.asarray(high, np.float64)[:, None] * count
  high = np.clip(np.maximum(high, low + 1e-6), 0, count)
  return np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1)


def _split_chunks(count: int) -> list[range]:
  starts = range(0, count, _CHUNK)
  return [range(s, min(s + _CHUNK, count)) for s in starts]


def _embed_crops(encoder, images, boxes, batch_size) -> np.ndarray:
  regions = [(i, box) for i, group in enumerate(boxes) for box in group]

  def read(index: int) -> np.ndarray:
    i, box = regions[index]
    return crop_box(images[i], box)

  crops, encoder = LazySequence(read, len(regions)), _with_squash(encoder)
  features = encoder.image(crops, outputs=("pooled",), batch_size=batch_size)
  return normalize(features.pooled)


def crop_box(image: np.ndarray, box: np.ndarray) -> np.ndarray:
  """Crops the pixels that a box touches."""
  height, width = image.shape[:2]
  low = np.floor(box[:2] * (height, width) + 1e-4).astype(int)
  high = np.ceil(box[2:] * (height, width) - 1e-4).astype(int)
  y0, x0 = np.clip(low, 0, (height - 1, width - 1))
  y1, x1 = np.maximum(high, (y0 + 1, x0 + 1))
  return image[y0:y1, x0:x1]


def _with_squash(encoder: Encoder) -> Encoder:
  """The encoder with squashed images: no crop, no native aspect ratio."""
  if not hasattr(encoder, "preprocess"):
    return encoder
  fields = {"resize": "squash", "crop": "none", "resize_size": None, "drop": 0}
  return encoder.with_preprocess(
    dataclasses.replace(encoder.preprocess.squashed(), **fields)
  )
