"""Compositionality: images and captions to choose from, with hard negatives.

An item has i images and c captions; image k matches caption k. With
s[a, b] = cos(image a, caption b) in an item,

    text   = every image scores its caption above the item's other captions
    image  = every caption scores its image above the item's other images
    group  = both

SugarCrepe (Hsieh et al. 2023) has one image with its caption and a negative:
`accuracy` is the mean over its kinds of negatives. Winoground (Thrush et al.
2022) has two images and two captions of the same words. As in their code, a tie
is wrong.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

from mtv_jax.config.options import PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals import retrieval
from mtv_jax.evals.core import bootstrap, global_features, ranking
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import Data, SelectionSet
from mtv_jax.evals.datasets import registry

SCORES = ("text_score", "image_score", "group_score")


@dataclasses.dataclass(frozen=True)
class Compositionality(Evaluator):
  """Matching of images and captions, with hard negatives.

  Attributes:
    images: folder of images, if not beside the annotations.
    view: the encoder's own preprocessing, or big_vision's `squash`; see
      `global_features.with_view`.
  """

  title = "Compositionality"
  main = ("accuracy", *SCORES)
  requires = frozenset({"text"})

  data: Data = "scenes"
  images: str | None = None
  view: global_features.ViewName = "encoder"
  count: PositiveInt | None = None  # items
  batch_size: PositiveInt = 64

  @functools.cached_property
  def _set(self) -> SelectionSet:
    return registry.open_selection(
      self.data, images=self.images, count=self.count
    )

  def run(self, encoder: Encoder) -> Result:
    """Returns accuracies by kind, or Winoground's three scores."""
    require_text(encoder)
    data = self._set
    encoder = global_features.with_view(encoder, self.view)
    image = global_features.embed(encoder, data, batch_size=self.batch_size)
    image = normalize(image)
    distinct, index = retrieval.distinct_texts(data.captions)
    text = normalize(encoder.text(distinct))
    ranking.check_finite(images=image, captions=text)
    captions = text[index].reshape(len(data.categories), -1, text.shape[1])
    # [n, i, c]; einsum sums each row alone, so that equal captions tie.
    scores = np.einsum("nie,nce->nic", image[data.image_index], captions)
    estimate, chance = score_items(scores, data)
    protocol = {
      **encoder.protocol(),
      "view": self.view,
      **data.protocol(),
      "items": len(data.categories),
      "captions_distinct": len(distinct),
      "prompt": "none",
      "similarity": "cosine, float32",
      "ties": "wrong",
    }
    return Result.from_estimate(estimate, protocol, chance)


def score_items(
  scores: Float[np.ndarray, "n i c"], data: SelectionSet
) -> tuple[Estimate, dict[str, float]]:
  """Metrics with errors over images or items, and chance."""
  images, captions = scores.shape[1:]
  pairs = np.arange(min(images, captions))
  pair_scores = scores[:, pairs, pairs]
  others = np.where(np.eye(images, captions, dtype=bool), -np.inf, scores)
  text = (pair_scores > others.max(axis=2)[:, pairs]).all(axis=1)
  if images > 1:
    image = (pair_scores > others.max(axis=1)[:, pairs]).all(axis=1)
    hits = dict(zip(SCORES, (text, image, text & image), strict=True))
    # In a sixth of the orders of four scores both correct scores are first.
    chance = (1 / captions**images, 1 / images**captions, 1 / 6)
    return bootstrap.means(hits), dict(zip(SCORES, chance, strict=True))
  kinds = list(dict.fromkeys(data.categories))
  is_kind = np.asarray(data.categories)[None] == np.asarray(kinds)[:, None]
  _, group = np.unique(data.image_index[:, 0], return_inverse=True)

  def metrics(weights):
    rows = is_kind * weights[group]
    item_counts = rows.sum(axis=1)
    by_kind = (rows @ text)[item_counts > 0] / item_counts[item_counts > 0]
    names = [kind for kind, n in zip(kinds, item_counts, strict=True) if n]
    return {
      "accuracy": by_kind.mean(),
      **dict(zip(names, by_kind, strict=True)),
    }

  estimate = bootstrap.estimate(metrics, 1 + int(group.max()))
  return estimate, dict.fromkeys(estimate.metrics, 1 / captions)
