"""Grounding: region-text retrieval, box classification, phrase localisation.

With z_a the embedding of region a, t_p that of distinct phrase p, and w_c the
zero-shot vector of class c (see `zero_shot.py`), all of unit length:

    region to phrase  R@k = mean over regions a of  a's phrase in top-k z_a.t_p
    phrase to region  R@k = mean over phrases p of  any region of p in top-k
    box top-k             = mean over regions a of  a's class in top-k z_a.w_c
    located               = mean over (image, phrase) of  IoU >= 0.5 of the
                            predicted box with any of the phrase's boxes there

Boxes are annotated, not detected. The protocols are those of this project.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification import zero_shot
from mtv_jax.evals.core import base, bootstrap, examples, prompts, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import BoxSet, Data
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.grounding import region_features
from mtv_jax.evals.retrieval import retrieval
from mtv_jax.utils import plots

_CHUNK = 256  # images whose phrases are located at a time
_FIXED_BOXES = 256
_IMAGE_SIZE = 320  # pixels per side on the sheet, so that names are legible


@dataclasses.dataclass(frozen=True)
class Grounding(Evaluator):
  """Region-text retrieval, box classification and phrase localisation.

  Attributes:
    data: see `datasets/registry.py`.
    images: the folder of COCO's images, if it is not beside the JSON.
    regions: how a box is embedded, see `region_features.py`; `auto` is the
      prompter of an encoder that has one, else `crop`.
    prompts: a file of templates for the classes (see `prompts.py`), and of
      other names for them, one per class in the data's order.
    locate: `auto` to locate phrases if the encoder has a locator, or `none`.
    count: images to use, evenly spaced; all by default (of the scenes 128).
  """

  data: Data = "scenes"
  images: str | None = None
  regions: Literal["auto", "prompter", "pool", "crop"] = "auto"
  prompts: str | None = None
  locate: Literal["auto", "none"] = "auto"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 32
  pictures: NonNegativeInt = 0  # Images on the sheet.

  @property
  def requires(self) -> frozenset[str]:
    """As in the base class."""
    prompter = {"grounding"} if self.regions == "prompter" else set()
    return frozenset({"text"} | prompter)

  @functools.cached_property
  def _set(self) -> tuple[BoxSet, prompts.Prompts | None]:
    data = registry.open_boxes(self.data, images=self.images, count=self.count)
    if data.classes is None:
      return data, None
    named = prompts.Prompts(classes=data.classes)
    if self.prompts:
      named = prompts.read_prompts(self.prompts, classes=len(data.classes))
    return data, named

  def run(self, encoder: Encoder) -> Result:
    """Retrieval in both directions; accuracies with classes or a locator."""
    base.require_text(encoder)
    data, named = self._set
    method = region_features.resolve(encoder, self.regions)
    region = region_features.embed(
      encoder,
      data.images,
      data.boxes,
      method=method,
      batch_size=self.batch_size,
    )
    phrases, owner = retrieval.distinct_texts(
      [phrase for names in data.phrases for phrase in names]
    )
    # The prompter was trained beside phrases of a length of their own.
    embed = encoder.phrases if method == "prompter" else encoder.text
    text = normalize(embed(phrases))
    protocol = {
      **encoder.protocol(),
      **region_features.protocol(encoder, method),
      "data": data.name,
      "data_hash": data.digest,
      "images": len(data.images),
      "boxes": sum(map(len, data.boxes)),
      "boxes_left_out": data.left_out,
      "box_source": "annotations",
      "regions": method,
      "phrase_prompt": "none",
      "phrase_length": encoder.phrase_length if method == "prompter" else None,
      "phrase_to_region": "hit if any region of the phrase is in the top k",
      "similarity": "cosine, float32, highest matmul precision",
      "ties": ranking.TIE_RULE,
      "phrases_distinct": len(phrases),
    }
    # Image-caption retrieval, with a distinct phrase in the role of the image.
    names = ("region_to_phrase", "phrase_to_region")
    image = np.repeat(np.arange(len(data.boxes)), [*map(len, data.boxes)])
    estimate = retrieval.recalls(
      text, region, owner=owner, names=names, groups=image
    )
    chance = retrieval.chance(owner, names=names)
    if named is not None:
      accuracies, uniform = zero_shot.class_accuracies(
        region,
        zero_shot.text_classifier(embed, named),
        np.concatenate(data.labels),
        groups=image,
      )
      estimate |= accuracies.rename("box_{}")
      chance |= {f"box_{name}": value for name, value in uniform.items()}
      protocol |= {
        "classes": len(named.classes),
        **named.protocol(),
        "mean_per_class": "over classes that have a box",
      }
    if self.locate == "auto" and encoder.can_predict("locator"):
      located, located_chance = _locate(encoder, data, self.batch_size)
      estimate |= located
      chance |= located_chance
      protocol |= {
        "located": "IoU >= 0.5 with any box of the phrase in the image",
        "located_chance": "the best constant box",
      }
    sheets = {}
    if self.pictures:
      sheet = _draw_sheet(data, region, text, phrases, count=self.pictures)
      sheets["regions"] = sheet
    return Result(
      estimate.metrics,
      protocol,
      chance,
      errors=estimate.errors,
      resamples=estimate.resamples,
      sheets=sheets,
    )


def _locate(
  encoder: Encoder, data: BoxSet, batch_size: int
) -> tuple[Estimate, dict[str, float]]:
  """IoU of the predicted boxes of phrases, and of the best constant answer."""
  queries = [tuple(dict.fromkeys(names)) for names in data.phrases]
  boxes = []
  for start in range(0, len(queries), _CHUNK):
    chosen = range(start, min(start + _CHUNK, len(queries)))
    out = encoder.locate(
      examples.select_images(data.images, chosen),
      [queries[i] for i in chosen],
      batch_size=batch_size,
    )
    boxes += [out.boxes[k, : len(queries[i])] for k, i in enumerate(chosen)]
  answers = fixed_answers(data)[:, None]

  def score(predicted):
    best = best_overlaps(predicted, queries, data)
    return {"located_iou50": best >= 0.5, "located_mean_iou": best}

  image = np.repeat(np.arange(len(queries)), [*map(len, queries)])
  constant = score([answers] * len(queries))
  chance = {k: float(v.mean(axis=1).max()) for k, v in constant.items()}
  return bootstrap.means(score(boxes), groups=image), chance


def best_overlaps(
  boxes: Sequence[Float[np.ndarray, "*answers _ 4"]],
  queries: Sequence[Sequence[str]],
  data: BoxSet,
) -> Float[np.ndarray, "*answers q"]:
  """The best IoU of each predicted box with a box of its phrase.

  `boxes` are of each image one for each of its `queries`, distinct phrases, or
  one for all of them.
  """
  best = []
  for predicted, image_queries, truth, phrases in zip(
    boxes, queries, data.boxes, data.phrases, strict=True
  ):
    same = np.asarray(
      [[p == query for p in phrases] for query in image_queries]
    )
    best.append(np.where(same, ious(predicted, truth), 0).max(axis=-1))
  return np.concatenate(best, axis=-1)


def fixed_answers(data: BoxSet) -> Float[np.ndarray, "c 4"]:
  """Constant answers: 256 of the set's boxes, and central ones."""
  annotated = examples.subsample(list(np.concatenate(data.boxes)), _FIXED_BOXES)
  sides = np.linspace(0.125, 1, 8)
  central = [
    (0.5 - h / 2, 0.5 - w / 2, 0.5 + h / 2, 0.5 + w / 2)
    for h in sides
    for w in sides
  ]
  return np.concatenate([np.stack(annotated), central])


def ious(
  a: Float[np.ndarray, "*n 4"], b: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "*n m"]:
  """Intersection over union of boxes (y0, x0, y1, x1); 0 if they lack area."""
  a, b = np.asarray(a, np.float64)[..., None, :], np.asarray(b, np.float64)
  low = np.maximum(a[..., :2], b[..., :2])
  high = np.minimum(a[..., 2:], b[..., 2:])
  both = np.maximum(high - low, 0).prod(axis=-1)
  areas = [np.maximum(x[..., 2:] - x[..., :2], 0).prod(axis=-1) for x in (a, b)]
  union = areas[0] + areas[1] - both
  return np.where(union > 0, both / np.where(union > 0, union, 1), 0)


def _draw_sheet(
  data: BoxSet,
  region: Float32[np.ndarray, "r e"],
  text: Float32[np.ndarray, "p e"],
  phrases: Sequence[str],
  *,
  count: int,
) -> np.ndarray:
  """Images with their boxes, named by annotation and by top-1 phrase."""
  starts = np.cumsum([0, *map(len, data.boxes)])
  rows = []
  for i in examples.subsample(range(len(data.images)), count):
    scores = region[starts[i] : starts[i + 1]] @ text.T
    top = [phrases[k] for k in np.argmax(scores, axis=1)]
    image = np.asarray(plots.fit_image(data.images[i], _IMAGE_SIZE))
    rows.append(
      [
        plots.draw_boxes(image, data.boxes[i], names)[0]
        for names in (data.phrases[i], top)
      ]
    )
  return plots.image_grid(rows, titles=("annotated", "top 1"), size=_IMAGE_SIZE)
