"""Image-text retrieval: recall at k in both directions.

With S[i, j] = cos(image i, caption j),

    text to image  R@k = mean over captions j of  j's image in top-k of S[:, j]
    image to text  R@k = mean over images i of  a caption of i in top-k of S[i]

As in CLIP_benchmark and big_vision, image to text is a hit rate over an image's
captions, not their recall.

Compositionality: an item has i images and c captions; image k matches caption
k. With s[a, b] = cos(image a, caption b) in an item,

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
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import ImageOps

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import bootstrap, global_features, ranking
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import (
  CaptionSet,
  Data,
  SelectionSet,
  subsample,
)
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK

TOP_KS = (1, 5, 10)
# Metric prefixes.
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
  """Image-text retrieval: R@1, 5 and 10 in both directions.

  Attributes:
    split: Karpathy split.
    max_captions: maximum number of captions per image, the first ones; all by
      default. (COCO's 5,000 test images have 25,010: some have six or seven.)
    view: the encoder's own preprocessing, or big_vision's `squash`; see
      `global_features.with_view`.
  """

  title = "Image-text retrieval"
  main = ("text_to_image_r1", "image_to_text_r1")
  requires = frozenset({"text"})

  data: Data = "scenes"
  images: str | None = None
  split: str = "test"
  max_captions: PositiveInt | None = None
  view: global_features.ViewName = "encoder"
  count: PositiveInt | None = None
  batch_size: PositiveInt = 64
  # Images on the sheet `captions`, captions on the sheet `images`.
  pictures: NonNegativeInt = 0

  @functools.cached_property
  def _set(self) -> CaptionSet:
    return registry.open_captions(
      self.data,
      images=self.images,
      split=self.split,
      count=self.count,
      max_captions=self.max_captions,
    )

  def run(self, encoder: Encoder) -> Result:
    """Returns metrics, and the sheets `captions` and `images`."""
    require_text(encoder)
    data = self._set
    encoder = global_features.with_view(encoder, self.view)
    image = global_features.embed(encoder, data, batch_size=self.batch_size)
    # Equal captions must have equal embeddings, so that they tie.
    distinct, index = distinct_texts(data.captions)
    text = encoder.text(distinct)[index]
    image, text = normalize(image), normalize(text)
    protocol = {
      **encoder.protocol(),
      "view": self.view,
      **data.protocol(),
      **({"split": data.split} if data.split else {}),
      "captions": len(data.captions),
      "captions_distinct": len(distinct),
      "max_captions": self.max_captions or "all",
      "prompt": "none",
      "image_to_text": "hit if any caption of the image is in the top k",
      "similarity": "cosine, float32, highest matmul precision",
      "ties": ranking.TIE_RULE,
    }
    sheets = {}
    if self.pictures:
      sheets = _draw_sheets(data, image, text, self.pictures)
    estimate, by_chance = recalls(image, text, data.owner), chance(data.owner)
    return Result.from_estimate(estimate, protocol, by_chance, sheets=sheets)


def distinct_texts(
  texts: Sequence[str],
) -> tuple[list[str], Int[np.ndarray, " m"]]:
  """The distinct texts in order of appearance, and the index of each text."""
  distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
  return list(distinct), np.asarray([distinct[t] for t in texts], np.int32)


def recalls(
  image: Float32[np.ndarray, "n e"],
  text: Float32[np.ndarray, "m e"],
  owner: Int[np.ndarray, " m"],
  *,
  names: tuple[str, str] = DIRECTIONS,
  groups: Int[np.ndarray, " m"] | None = None,
  block_bytes: int = 2**26,
) -> Estimate:
  """R@1, 5 and 10 of normalised embeddings, in both directions.

  `owner` is the image of each caption, `names` the prefixes of the metrics.
  Errors resample captions with their image, or by `groups`.
  """
  ids = np.arange(len(image))
  rank = functools.partial(ranking.ranks, block_bytes=block_bytes)
  to_image = rank(text, image, query_ids=owner, candidate_ids=ids)
  to_text = rank(image, text, query_ids=ids, candidate_ids=owner)
  image_hits, text_hits = (
    {f"{name}_r{k}": ranks < k for k in TOP_KS}
    for name, ranks in zip(names, (to_image, to_text), strict=True)
  )
  groups = owner if groups is None else groups
  return bootstrap.means(image_hits, groups=groups) | bootstrap.means(text_hits)


def chance(
  owner: Int[np.ndarray, " m"], *, names: tuple[str, str] = DIRECTIONS
) -> dict[str, float]:
  """Expected `recalls` of random embeddings.

  An image has several correct captions, but a caption only one correct image.
  """
  _, counts = np.unique(owner, return_counts=True)
  ones, n, m = np.ones(1, int), len(counts), len(owner)
  return {f"{names[0]}_r{k}": ranking.chance(ones, n, k) for k in TOP_KS} | {
    f"{names[1]}_r{k}": ranking.chance(counts, m, k) for k in TOP_KS
  }


GREEN = (0, 140, 90)  # colour of the correct captions and images
_TOP = 4  # candidates per query on a sheet


def _draw_sheets(data: CaptionSet, image, text, count: int) -> dict:
  """Draws top captions of `count` images, and top images of first captions."""
  indices = subsample(range(len(data.images)), count)
  by_image, by_caption = [], []
  for i in indices:
    first = np.searchsorted(data.owner, i)
    by_image.append(rank_captions(data, i, text @ image[i]))
    by_caption.append(rank_images(data, int(first), image @ text[first]))
  return {
    "captions": plots.vstack(by_image),
    "images": plots.vstack(by_caption),
  }


def rank_captions(
  data: CaptionSet, i: int, scores: Float[np.ndarray, " m"]
) -> UInt8[np.ndarray, "h w 3"]:
  """An image beside its top captions and its own best one; own are green."""
  order = np.argsort(-scores, kind="stable")
  captions = list(dict.fromkeys(data.captions[j] for j in order))
  own = {data.captions[j] for j in np.flatnonzero(data.owner == i)}
  ranks = [*range(min(_TOP, len(captions)))]
  best = min(map(captions.index, own))
  width, size = plots.SHEET_WIDTH - plots.THIRD - GAP, plots.SHEET_TEXT
  lines = []
  for rank in ranks if best in ranks else [*ranks, best]:
    text = f"{rank + 1}. {captions[rank]}"
    ink = GREEN if captions[rank] in own else INK
    lines += [(x, ink) for x in plots.wrap(text, width, lines=2, size=size)]
  picture = np.asarray(plots.fit_image(data.images[i], plots.THIRD))
  return plots.hstack([picture, plots.draw_lines(lines, width, size=size)])


def rank_images(
  data: CaptionSet, j: int, scores: Float[np.ndarray, " n"]
) -> UInt8[np.ndarray, "h w 3"]:
  """A caption above its top images; its own image has a green frame."""
  order = np.argsort(-scores, kind="stable")
  rank = int(np.flatnonzero(order == data.owner[j])[0])
  caption = data.captions[j]
  if rank >= _TOP:
    caption = f"(own image: rank {rank + 1}) {caption}"
  width, size = plots.SHEET_WIDTH, plots.SHEET_TEXT
  line = plots.draw_lines(
    [(plots.shorten(caption, width, size), INK)], width, size=size
  )
  side = (width + GAP) // _TOP - GAP
  row = []
  for k in order[:_TOP]:
    picture = plots.fit_image(data.images[int(k)], side)
    if k == data.owner[j]:
      inside = picture.resize((picture.width - 8, picture.height - 8))
      picture = ImageOps.expand(inside, 4, GREEN)
    row.append(np.asarray(picture))
  return plots.vstack([line, plots.hstack(row)], gap=2)


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
    distinct, index = distinct_texts(data.captions)
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
