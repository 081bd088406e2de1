"""Image-text retrieval: recall at k in both directions.

With S[i, j] = cos(image i, caption j),

    text to image  R@k = mean over captions j of  j's image in top-k of S[:, j]
    image to text  R@k = mean over images i of  a caption of i in top-k of S[i]

As in CLIP_benchmark and big_vision, image to text is a hit rate over an image's
captions, not their recall.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from PIL import Image, ImageDraw

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import bootstrap, global_features, ranking
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.bootstrap import Estimate
from mtv_jax.evals.core.examples import CaptionSet, Data, subsample
from mtv_jax.evals.datasets import registry
from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK, PAPER
from mtv_jax.utils.plots import SHEET_LINE as LINE_HEIGHT

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


def _draw_sheets(data: CaptionSet, image, text, count: int) -> dict:
  """Draws top captions of `count` images, and top images of first captions.

  The images are evenly spaced.
  """
  indices = subsample(range(len(data.images)), count)
  # Equal captions share a line of the sheet.
  distinct, index = distinct_texts(data.captions)
  _, columns = np.unique(index, return_index=True)
  correct = np.zeros((len(indices), len(distinct)), bool)
  for row, i in enumerate(indices):
    correct[row, index[data.owner == i]] = True
  queries = np.searchsorted(data.owner, indices)
  images, scores = [data.images[i] for i in indices], image[indices] @ text.T
  captions, vectors = [data.captions[j] for j in queries], text[queries]
  return {
    "captions": ranked_captions(images, scores[:, columns], distinct, correct),
    "images": ranked_images(captions, vectors @ image.T, data.images, indices),
  }


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
_FRAME = 4


def ranked_captions(
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  scores: Float[np.ndarray, "n m"],
  captions: Sequence[str],
  correct: Bool[np.ndarray, "n m"],
  *,
  top: int = 3,
) -> UInt8[np.ndarray, "h w 3"]:
  """Sheet of images, each beside its top captions.

  Correct captions are green and marked. If none is in the top, the best-ranked
  correct caption is appended with its rank.
  """
  x, size = plots.THIRD + GAP, plots.SHEET_TEXT
  text_width, rows = plots.SHEET_WIDTH - x - 2 * GAP, []
  for i, image in enumerate(images):
    order = np.argsort(-scores[i], kind="stable")
    ranks = list(range(min(top, len(order))))
    if not correct[i, order[:top]].any() and correct[i].any():
      ranks.append(int(np.argmax(correct[i, order])))
    lines = [
      (line, correct[i, order[rank]])
      for rank in ranks
      for line in plots.wrap(
        f"{rank + 1}. {captions[order[rank]]}", text_width, lines=2, size=size
      )
    ]
    height = max(plots.THIRD, len(lines) * LINE_HEIGHT)
    row = Image.new("RGB", (plots.SHEET_WIDTH, height), PAPER)
    row.paste(plots.fit_image(image, plots.THIRD), (0, 0))
    draw = ImageDraw.Draw(row)
    for k, (line, is_correct) in enumerate(lines):
      y, ink = k * LINE_HEIGHT, GREEN if is_correct else INK
      if is_correct:
        draw.rectangle((x, y + 2, x + 5, y + LINE_HEIGHT - 3), fill=GREEN)
      draw.text((x + 12, y), line, ink, plots.font(size))
    rows.append(np.asarray(row))
  return plots.vstack(rows)


def ranked_images(
  captions: Sequence[str],
  scores: Float[np.ndarray, "n m"],
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  owner: Sequence[int],
  *,
  top: int = 4,
) -> UInt8[np.ndarray, "h w 3"]:
  """Sheet of captions, each above its top images.

  The correct image has a green frame, or its rank is beside the caption.
  """
  width = plots.SHEET_WIDTH
  side = (width + GAP) // top
  size = side - GAP
  top = min(top, len(images))
  height = LINE_HEIGHT + 4 + side
  sheet = Image.new("RGB", (width, height * len(captions)), PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, caption in enumerate(captions):
    order = np.argsort(-scores[i], kind="stable")
    rank = int(np.flatnonzero(order == owner[i])[0])
    suffix = "" if rank < top else f"  (own image: rank {rank + 1})"
    text_width = width - plots.text_width(suffix, plots.SHEET_TEXT)
    text = plots.shorten(caption, text_width, plots.SHEET_TEXT) + suffix
    draw.text((0, i * height), text, INK, plots.font(plots.SHEET_TEXT))
    for k, j in enumerate(order[:top]):
      x, y = k * side, i * height + LINE_HEIGHT + 2
      image = plots.fit_image(images[int(j)], size)
      sheet.paste(image, (x, y))
      if j == owner[i]:
        frame = (x, y, x + image.width - 1, y + image.height - 1)
        draw.rectangle(frame, outline=GREEN, width=_FRAME)
  return np.asarray(sheet)
