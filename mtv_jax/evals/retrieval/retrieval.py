"""Image-text retrieval: captions find their image, images one of theirs.

With S[i, j] = cos(image i, caption j),

    text to image  R@k = mean over captions j of  own image in top-k of S[:, j]
    image to text  R@k = mean over images i of  any own caption in top-k of S[i]

The second counts a hit where any caption is found, as CLIP_benchmark and
big_vision do; it is not the recall of an image's captions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.core import base, ranking
from mtv_jax.evals.core.base import Evaluator, Result
from mtv_jax.evals.core.examples import CaptionSet, Data
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.retrieval import sheets

AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
  """Image-text retrieval.

  Attributes:
    data: see `datasets/registry.py`.
    images: the folder of images, where it is not beside the JSON.
    split: of Karpathy's file.
    max_captions: the first captions of an image to use; all by default. (Of
      COCO's 5,000 test images some have six or seven: 25,010 captions.)
    count: images to use, evenly spaced; all by default.
    batch_size: images a step.
    pictures: how many images, and how many captions, the sheets of what was
      found show.
  """

  data: Data = "scenes"
  images: str | None = None
  split: str = "test"
  max_captions: int | None = None
  count: int | None = None
  batch_size: int = 64
  pictures: int = 0

  @functools.cached_property
  def _set(self) -> CaptionSet:
    return registry.open_captions(
      self.data,
      images=self.images,
      split=self.split,
      count=self.count,
      max_captions=self.max_captions,
    )

  def prepare(self) -> None:
    """Reads names and annotations, and keeps them."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """R@1, 5 and 10, both ways; `captions` and `images` as pictures."""
    base.require_text(encoder)
    data = self._set
    image = encoder.image(
      data.images, outputs=("pooled",), batch_size=self.batch_size
    ).pooled
    # Equal captions must have equal embeddings, so that they tie.
    texts = list(dict.fromkeys(data.captions))
    place = {text: i for i, text in enumerate(texts)}
    text = encoder.text(texts)[[place[c] for c in data.captions]]
    image, text = normalize(image), normalize(text)
    metrics = recalls(image, text, owner=data.owner)
    protocol = self._protocol(encoder, data, distinct=len(texts))
    pictures = {}
    if self.pictures:
      pictures = found_sheets(data, image, text, self.pictures)
    return Result(metrics, protocol, chance(data.owner), pictures=pictures)

  def _protocol(
    self, encoder: Encoder, data: CaptionSet, *, distinct: int
  ) -> dict[str, Any]:
    return {
      **encoder.protocol(),
      "data": data.name,
      "data_hash": data.digest,
      **({"split": data.split} if data.split else {}),
      "images": len(data.images),
      "captions": len(data.captions),
      "captions_distinct": distinct,
      "max_captions": self.max_captions or "all",
      "prompt": "none",
      "image_to_text": "hit if any caption of the image is in the top k",
      "similarity": "cosine, float32, highest matmul precision",
      "ties": ranking.TIE_RULE,
    }


def recalls(
  image: Float32[np.ndarray, "n e"],
  text: Float32[np.ndarray, "m e"],
  *,
  owner: Int[np.ndarray, " m"],
  block_bytes: int = 2**26,
) -> dict[str, float]:
  """R@1, 5 and 10 both ways.

  Args:
    image: normalised embeddings.
    text: normalised embeddings.
    owner: the image of each caption.
    block_bytes: size of the largest block of scores held.
  """
  ids = np.arange(len(image))
  to_image = ranking.ranks(
    text, image, query_ids=owner, candidate_ids=ids, block_bytes=block_bytes
  )
  to_text = ranking.ranks(
    image, text, query_ids=ids, candidate_ids=owner, block_bytes=block_bytes
  )
  return {
    f"{name}_r{k}": rate
    for name, found in (("text_to_image", to_image), ("image_to_text", to_text))
    for k, rate in ranking.hit_rates(found, AT).items()
  }


def found_sheets(
  data: CaptionSet,
  image: Float32[np.ndarray, "n e"],
  text: Float32[np.ndarray, "m e"],
  count: int,
) -> dict[str, np.ndarray]:
  """Sheets of what some images and some captions find.

  Args:
    data: whose images and captions.
    image: normalised embeddings.
    text: normalised embeddings.
    count: images, and captions, evenly spaced, each first of its image.

  Returns:
    `captions`, the best ones of each image, and `images`, those of a caption.
  """
  count = min(count, len(data.images))
  chosen = [(2 * i + 1) * len(data.images) // (2 * count) for i in range(count)]
  # Equal captions are one line of the sheet, not five.
  _, first = np.unique(data.captions, return_index=True)
  first = np.sort(first)
  distinct = [data.captions[j] for j in first]
  mine = [
    {c for c, o in zip(data.captions, data.owner, strict=True) if o == i}
    for i in chosen
  ]
  own = np.array([[c in captions for c in distinct] for captions in mine])
  asked = np.searchsorted(data.owner, chosen)
  return {
    "captions": sheets.ranked_captions(
      [data.images[i] for i in chosen],
      image[chosen] @ text[first].T,
      distinct,
      own,
    ),
    "images": sheets.ranked_images(
      [data.captions[j] for j in asked],
      text[asked] @ image.T,
      data.images,
      chosen,
    ),
  }


def chance(owner: Int[np.ndarray, " m"]) -> dict[str, float]:
  """What random embeddings expect.

  k of n images; and for an image with c of m captions, one minus the share of
  ways to draw k captions that miss all c.
  """
  _, counts = np.unique(owner, return_counts=True)
  n, m = len(counts), len(owner)
  rates = {f"text_to_image_r{k}": min(k, n) / n for k in AT}
  for k in AT:
    draws = math.comb(m, min(k, m))
    hits = [1 - math.comb(m - int(c), min(k, m)) / draws for c in counts]
    rates[f"image_to_text_r{k}"] = float(np.mean(hits))
  return rates
