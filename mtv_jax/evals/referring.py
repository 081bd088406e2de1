"""Referring expression comprehension (RefCOCO, RefCOCO+, RefCOCOg).

An expression describes one of the annotated boxes of its image. Accuracies over
the expressions, of which equal ones count as often as they occur:

  located_iou50   IoU >= 0.5 of the predicted box with the described box, as
                  published; for encoders with a locator
  chosen          the described box has the largest cosine with the expression
                  among all annotated boxes (ground-truth proposals, as in
                  MAttNet, Yu et al. 2018); for encoders with a text tower
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals import grounding, retrieval
from mtv_jax.evals.core import base, bootstrap, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import Data, ReferringSet
from mtv_jax.evals.datasets import registry


@dataclasses.dataclass(frozen=True)
class ReferringEvaluator(Evaluator):
  """Referring expressions: predicted boxes, and choice of an annotated box.

  Attributes:
    split: `val`, `testA`, `testB`, or `test` for all test splits.
    regions, locate: see `GroundingEvaluator`.
  """

  title = "Referring expressions"
  main = ("located_iou50", "chosen")
  requires = frozenset({"text"})

  data: Data = "scenes"
  images: str | None = None
  split: str = "val"
  regions: Literal["auto", "prompter", "pool", "crop"] = "auto"
  locate: Literal["auto", "none"] = "auto"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 32

  @functools.cached_property
  def _set(self) -> ReferringSet:
    return registry.open_referring(
      self.data, images=self.images, split=self.split, count=self.count
    )

  def run(self, encoder: Encoder) -> Result:
    """Accuracies over the expressions; errors resample images."""
    base.require_text(encoder)
    data = self._set
    method = grounding.resolve_regions(encoder, self.regions)
    image = np.repeat(np.arange(len(data.boxes)), [*map(len, data.expressions)])
    chosen = self._choose(encoder, data, method)
    estimate = bootstrap.means({"chosen": chosen}, groups=image)
    counts = np.array([*map(len, data.boxes)])
    chance = {"chosen": float(np.mean(1 / counts[image]))}
    if self.locate == "auto" and encoder.can_predict("locator"):
      located, best = _locate(encoder, data, self.batch_size, image)
      estimate, chance = located | estimate, best | chance
    protocol = {
      **encoder.protocol(),
      **grounding.regions_preprocess(encoder, method),
      **data.protocol(),
      "split": data.split,
      "expressions": len(image),
      "boxes": int(counts.sum()),
      "regions": method,
      "located_iou50": "IoU >= 0.5 with the described box",
      "chosen": "among all annotated boxes of the image",
      "located_chance": "the best constant box",
      "similarity": "cosine, float32",
    }
    return Result.from_estimate(estimate, protocol, chance)

  def _choose(
    self, encoder: Encoder, data: ReferringSet, method: str
  ) -> np.ndarray:
    """Whether each expression's box scores highest in its image."""
    region = grounding.embed_regions(
      encoder, data.images, data.boxes, method=method,
      batch_size=self.batch_size,
    )  # fmt: skip
    texts, index = retrieval.distinct_texts(
      [text for own in data.expressions for text in own]
    )
    embed = encoder.phrases if method == "prompter" else encoder.text
    text = normalize(embed(texts))
    ranking.check_finite(regions=region, expressions=text)
    ends = np.cumsum([*map(len, data.boxes)])
    starts = np.cumsum([*map(len, data.expressions)])
    boxes = np.split(region, ends[:-1])
    own = np.split(text[index], starts[:-1])
    rows = zip(boxes, own, data.targets, strict=True)
    return np.concatenate(
      [np.argmax(b @ t.T, axis=0) == targets for b, t, targets in rows]
    )


def _locate(
  encoder: Encoder, data: ReferringSet, batch_size: int, image: np.ndarray
) -> tuple[Estimate, dict[str, float]]:
  """Accuracy of predicted boxes; chance is the best constant box."""
  queries = [tuple(dict.fromkeys(own)) for own in data.expressions]
  predicted = grounding.predict_boxes(encoder, data.images, queries, batch_size)
  pairs = zip(data.expressions, queries, predicted, strict=True)
  boxes = np.concatenate(
    [rows[[asked.index(text) for text in own]] for own, asked, rows in pairs]
  )
  truth = np.concatenate(
    [b[t] for b, t in zip(data.boxes, data.targets, strict=True)]
  )
  overlaps = grounding.paired_ious(boxes, truth)
  constant = grounding.fixed_answers(data)[:, None]
  best = grounding.paired_ious(constant, truth) >= 0.5
  return (
    bootstrap.means({"located_iou50": overlaps >= 0.5}, groups=image),
    {"located_iou50": float(best.mean(axis=1).max())},
  )
