"""Region embeddings in the space of the texts.

Three methods:

  prompter   the region prompter, the head that the grounding objective trains
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

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Images
from mtv_jax.parallel.mesh import replicated_sharding

_CHUNK = 256  # images whose boxes are embedded at a time


def resolve(encoder: Encoder, method: str) -> str:
  """The method for this encoder's boxes: `auto` is `prompter` or `crop`.

  Raises:
    NotApplicable: for a method that the encoder does not support.
  """
  has_prompter = encoder.can_predict("grounding")
  if method == "auto":
    return "prompter" if has_prompter else "crop"
  if method == "prompter" and not has_prompter:
    raise NotApplicable(
      "this encoder has no prompter, which the objective 'grounding' trains; "
      "regions='crop' works with any"
    )
  if method == "pool" and encoder.spec.image.pool != "mean":
    raise NotApplicable(
      f"this encoder pools by {encoder.spec.image.pool!r}, so that its patches "
      "are not in the space of its texts; regions='crop' works with any"
    )
  return method


def protocol(encoder: Encoder, method: str) -> dict[str, Any]:
  """The preprocessing of `embed`, for JSON."""
  if not hasattr(encoder, "preprocess"):
    return {}
  # The prompter uses the encoder's preprocessing.
  used = encoder if method == "prompter" else _with_squash(encoder)
  of = "the box's pixels" if method == "crop" else "the whole image"
  return {"preprocess": {**used.preprocess.to_dict(), "of": of}}


def embed(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[Float32[np.ndarray, "_ 4"]],
  *,
  method: str,
  batch_size: int = 32,
) -> Float32[np.ndarray, "r e"]:
  """Normalised embeddings of all boxes, image by image.

  `boxes` are of each image, (y0, x0, y1, x1) in the unit square; `method` is
  `prompter`, `pool` or `crop`.
  """
  if method == "crop":
    return _embed_crops(encoder, images, boxes, batch_size)
  embeddings = []
  for start in range(0, len(images), _CHUNK):
    chosen = range(start, min(start + _CHUNK, len(images)))
    part = examples.select_images(images, chosen)
    image_boxes = [boxes[i] for i in chosen]
    if method == "prompter":
      regions = encoder.ground(part, image_boxes, batch_size=batch_size)
      embeddings.append(regions.embeddings[regions.valid])
    else:
      embeddings.append(_pool_patches(encoder, part, image_boxes, batch_size))
  return np.concatenate(embeddings)


def _pool_patches(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[np.ndarray],
  batch_size: int,
) -> np.ndarray:
  # Squashed, so that the unit square is the whole image.
  features = _with_squash(encoder).image(
    images, outputs=("patches",), batch_size=batch_size
  )
  rows = []
  for grid, image_boxes in zip(features.patches, boxes, strict=True):
    down = covered(image_boxes[:, 0], image_boxes[:, 2], grid.shape[0])
    across = covered(image_boxes[:, 1], image_boxes[:, 3], grid.shape[1])
    total = np.einsum("by,bx,yxd->bd", down, across, grid, optimize=True)
    rows.append(total / (down.sum(1) * across.sum(1))[:, None])
  pooled = np.concatenate(rows).astype(np.float32)
  if encoder.spec.image.projection is not None:
    kernel = encoder.params["image"]["projection"]["kernel"]
    # On a pod each host has a shard of it.
    replicate = jax.jit(
      lambda x: x, out_shardings=replicated_sharding(encoder.mesh)
    )
    pooled = pooled @ np.asarray(replicate(kernel))
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


def _embed_crops(
  encoder: Encoder,
  images: Sequence[Any],
  boxes: Sequence[np.ndarray],
  batch_size: int,
) -> np.ndarray:
  regions = [
    (i, box) for i, image_boxes in enumerate(boxes) for box in image_boxes
  ]

  def read(index: int) -> np.ndarray:
    i, box = regions[index]
    return crop(images[i], box)

  features = _with_squash(encoder).image(
    Images(read, len(regions)), outputs=("pooled",), batch_size=batch_size
  )
  return normalize(features.pooled)


def crop(image: np.ndarray, box: np.ndarray) -> np.ndarray:
  """The pixels that a box touches."""
  height, width = image.shape[:2]
  low = np.floor(box[:2] * (height, width) + 1e-4).astype(int)
  high = np.ceil(box[2:] * (height, width) - 1e-4).astype(int)
  y0, x0 = np.clip(low, 0, (height - 1, width - 1))
  y1, x1 = np.maximum(high, (y0 + 1, x0 + 1))
  return image[y0:y1, x0:x1]


def _with_squash(encoder: Encoder) -> Encoder:
  """The encoder with images squashed, not cropped or of native aspect ratio."""
  if not hasattr(encoder, "preprocess"):
    return encoder
  preprocess = encoder.preprocess.squashed()
  if preprocess.crop != "none":
    preprocess = dataclasses.replace(
      preprocess, resize="squash", crop="none", resize_size=None
    )
  return encoder.with_preprocess(preprocess)
