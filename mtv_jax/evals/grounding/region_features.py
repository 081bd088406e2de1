"""Region embeddings in the space of the texts.

Three methods:

  prompter   the region prompter, the head that grounding trains
  pool       the mean of the patches in the box, each weighted by the share of
             it that the box covers; for encoders that pool by the mean
  crop       the box's pixels, warped to a square and encoded as an image
             (R-CNN, Girshick et al. 2014); for any encoder with a text tower
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Images
from mtv_jax.parallel.mesh import replicated_sharding

WAYS = ("prompter", "pool", "crop")
# Images whose boxes are embedded at a time.
_CHUNK = 256


def resolve(encoder: Encoder, way: str) -> str:
  """The method for this encoder's boxes: `auto` is `prompter` or `crop`.

  Raises:
    NotApplicable: for a method that the encoder does not support.
  """
  has_prompter = encoder.can_predict("grounding")
  if way == "auto":
    return "prompter" if has_prompter else "crop"
  if way == "prompter" and not has_prompter:
    raise NotApplicable(
      "this encoder has no prompter, as a run with the objective 'grounding' "
      "has; regions='crop' works with any"
    )
  if way == "pool" and encoder.spec.image.pool != "mean":
    raise NotApplicable(
      f"this encoder pools by {encoder.spec.image.pool!r}, so that its patches "
      "are not in the space of its texts; regions='crop' works with any"
    )
  return way


def protocol(encoder: Encoder, way: str) -> dict[str, Any]:
  """The preprocessing of `embed`, for JSON."""
  if not hasattr(encoder, "preprocess"):
    return {}
  # The prompter takes the encoder's own preprocessing.
  used = encoder if way == "prompter" else _squashing(encoder)
  of = {"crop": "the box's pixels"}.get(way, "the whole image")
  return {"preprocess": {**used.preprocess.to_dict(), "of": of}}


def embed(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[Float32[np.ndarray, "_ 4"]],
  *,
  way: str,
  batch_size: int = 32,
) -> Float32[np.ndarray, "r e"]:
  """Normalised embeddings of all boxes, image by image.

  Args:
    encoder: with a text tower.
    images: n of them.
    boxes: of each image, (y0, x0, y1, x1) in the unit square.
    way: the method, one of `WAYS`.
    batch_size: images a step, or crops.
  """
  if way == "crop":
    return _crops(encoder, images, boxes, batch_size)
  found = []
  for start in range(0, len(images), _CHUNK):
    chosen = range(start, min(start + _CHUNK, len(images)))
    part = examples.select_images(images, chosen)
    own = [boxes[i] for i in chosen]
    if way == "prompter":
      regions = encoder.ground(part, own, batch_size=batch_size)
      found.append(regions.embeddings[regions.valid])
    else:
      found.append(_pooled(encoder, part, own, batch_size))
  return np.concatenate(found)


def _pooled(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[np.ndarray],
  batch_size: int,
) -> np.ndarray:
  # Squashed, so that the unit square is the whole image.
  patches = (
    _squashing(encoder)
    .image(images, outputs=("patches",), batch_size=batch_size)
    .patches
  )
  height, width = patches.shape[1:3]
  rows = []
  for grid, own in zip(patches, boxes, strict=True):
    down = covered(own[:, 0], own[:, 2], height)
    across = covered(own[:, 1], own[:, 3], width)
    total = np.einsum("by,bx,yxd->bd", down, across, grid, optimize=True)
    rows.append(total / (down.sum(1) * across.sum(1))[:, None])
  pooled = np.concatenate(rows).astype(np.float32)
  if encoder.spec.image.projection is not None:
    kernel = encoder.params["image"]["projection"]["kernel"]
    # On a pod each host has a shard of it.
    whole = jax.jit(
      lambda x: x, out_shardings=replicated_sharding(encoder.mesh)
    )
    pooled = pooled @ np.asarray(whole(kernel))
  return normalize(pooled)


def covered(
  low: Float32[np.ndarray, " b"], high: Float32[np.ndarray, " b"], count: int
) -> np.ndarray:
  """`[b, count]`: of each of `count` equal cells, the share in [low, high].

  An empty interval still covers a positive share of its cell.
  """
  cells = np.arange(count)
  low = np.clip(np.asarray(low, np.float64)[:, None] * count, 0, count - 1e-6)
  high = np.asarray(high, np.float64)[:, None] * count
  high = np.clip(np.maximum(high, low + 1e-6), 0, count)
  return np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1)


def _crops(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[np.ndarray],
  batch_size: int,
) -> np.ndarray:
  crops = [(i, box) for i, own in enumerate(boxes) for box in own]

  def crop(index: int) -> np.ndarray:
    i, box = crops[index]
    return cut(images[i], box)

  features = _squashing(encoder).image(
    Images(crop, len(crops)), outputs=("pooled",), batch_size=batch_size
  )
  return normalize(features.pooled)


def cut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
  """The pixels that a box touches."""
  height, width = image.shape[:2]
  low = np.floor(box[:2] * (height, width) + 1e-4).astype(int)
  high = np.ceil(box[2:] * (height, width) - 1e-4).astype(int)
  y0, x0 = np.clip(low, 0, (height - 1, width - 1))
  y1, x1 = np.maximum(high, (y0 + 1, x0 + 1))
  return image[y0:y1, x0:x1]


def _squashing(encoder: Encoder) -> Encoder:
  """The encoder with images squashed rather than cropped."""
  if not hasattr(encoder, "preprocess") or encoder.preprocess.crop == "none":
    return encoder
  return encoder.with_preprocess(
    dataclasses.replace(
      encoder.preprocess, resize="squash", crop="none", resize_size=None
    )
  )
