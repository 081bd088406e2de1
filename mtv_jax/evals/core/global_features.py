"""Image embeddings for classification: pooled, CLS or mean-patch features."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import mean_patches
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core import features
from mtv_jax.evals.core.examples import ClassificationSet, select_images
from mtv_jax.models import stack as stack_lib
from mtv_jax.utils.errors import InputError

View = Literal["center", "squash_center", "squash", "encoder"]
Feature = Literal["pooled", "cls", "mean"]
Pixels = Literal["images", "crops"]

# Of the views beside "encoder": the size before the crop, relative to the input
# size, and other fields of `Preprocess`.
_VIEWS = {
  "center": (
    256 / 224,
    {
      "resize": "shortest",
      "interpolation": "bicubic",
      "crop": "center",
      "crop_rounding": "nearest",
    },
  ),
  "squash_center": (256 / 224, {"crop": "center", "antialias": False}),
  "squash": (1, {"antialias": False}),
}

# Size of the patches of a chunk of images, of which the mean is computed.
_CHUNK_BYTES = 2**29

# Encoders with the preprocessing of a protocol, by the encoder they copy, so
# that features are cached once for each.
_views: weakref.WeakKeyDictionary[Encoder, dict[Preprocess, Encoder]] = (
  weakref.WeakKeyDictionary()
)


def view(encoder: Encoder, name: View) -> Encoder:
  """The encoder with the preprocessing of a protocol.

  Args:
    encoder: any.
    name: `encoder` is its own preprocessing. `center` is that of DINOv2 and
      MAE: the shorter side to 256/224 of the input size (bicubic,
      antialiased), then torchvision's middle square. `squash_center` is that of
      big_vision's zero-shot and few-shot evaluations,
      `resize(256)|central_crop(224)`: both sides to 256/224 of the input size
      (bilinear, not antialiased, as `tf.image.resize`), then the middle square.
      `squash` is that of its retrieval, `resize(224)`, without a crop.
  """
  if name == "encoder":
    return encoder
  base = encoder.preprocess
  scale, fields = _VIEWS[name]
  preprocess = Preprocess(
    size=base.size,
    mean=base.mean,
    std=base.std,
    resize_size=int(base.size * scale),
    **fields,
  )
  copies = _views.setdefault(encoder, {})
  if preprocess not in copies:
    copies[preprocess] = encoder.with_preprocess(preprocess)
  return copies[preprocess]


def embed(
  encoder: Encoder,
  data: ClassificationSet,
  *,
  feature: Feature = "pooled",
  batch_size: int = 64,
  pixels: Pixels = "images",
) -> Float32[np.ndarray, "n d"]:
  """One vector per image, not normalised.

  Args:
    encoder: any.
    data: the images and their hash.
    feature: `pooled` is the encoder's embedding (attention pooling, projected
      CLS token, ...); `cls` the CLS token and `mean` the mean of the patch
      tokens, both after the final norm.
    batch_size: images per step.
    pixels: `images` go through the encoder's preprocessing, and features but
      `mean` are cached; `crops` have its input size and are only normalised.

  Raises:
    InputError: for `cls`, if the encoder lacks a CLS token.
  """
  if feature == "cls" and not encoder.spec.image.cls_token:
    raise InputError(
      f"feature='cls': {encoder!r} has no CLS token; take 'pooled' or 'mean'"
    )
  if feature == "mean":
    return last_blocks(
      encoder, data.images, batch_size=batch_size, pixels=pixels
    ).mean
  encode = functools.partial(
    features.encode_images, encoder, digest=data.digest
  )
  if pixels == "crops":
    encode = encoder.dense
  output = {"pooled": "pooled", "cls": "prefix"}[feature]
  out = encode(data.images, outputs=(output,), batch_size=batch_size)
  return out.pooled if feature == "pooled" else out.prefix[:, 0]


@dataclasses.dataclass(frozen=True)
class LastBlocks:
  """Features of the last blocks for linear probes."""

  # One array per block, the last block first: the CLS token after the final
  # norm. Without CLS tokens, the last block's is the embedding; the others' are
  # the mean patch token after the final norm.
  tokens: tuple[Float32[np.ndarray, "n _"], ...]
  # Mean of the last block's patch tokens after the final norm.
  mean: Float32[np.ndarray, "n d"]


def token_kinds(encoder: Encoder) -> str:
  """Description of `LastBlocks.tokens`, for the protocol."""
  after = " after the final norm" if encoder.spec.image.final_norm else ""
  if encoder.spec.image.cls_token:
    return f"CLS token{after}"
  return f"embedding; of earlier blocks the mean patch{after}"


def last_blocks(
  encoder: Encoder,
  images: Sequence[Any],
  *,
  blocks: int = 1,
  batch_size: int = 64,
  pixels: Pixels = "images",
) -> LastBlocks:
  """The tokens of the last blocks and the mean patch.

  Patches are reduced a chunk of images at a time, to bound memory.

  Args:
    encoder: any.
    images: any size.
    blocks: how many, of those the encoder has.
    batch_size: images per step.
    pixels: as for `embed`.
  """
  depth = encoder.spec.image.depth
  layers = tuple(range(depth - 2, depth - 1 - blocks, -1))
  cls = encoder.spec.image.cls_token
  run = {"images": encoder.image, "crops": encoder.dense}[pixels]
  size = encoder.preprocess.size // encoder.spec.image.patch_size
  each = 4 * (1 + len(layers)) * size**2 * encoder.spec.image.width
  chunk = max(batch_size, _CHUNK_BYTES // each // batch_size * batch_size)
  parts = []
  for start in range(0, len(images), chunk):
    some = range(start, min(start + chunk, len(images)))
    out = run(
      select_images(images, some),
      layers=layers,
      outputs=("patches", "prefix" if cls else "pooled"),
      batch_size=batch_size,
    )
    mean = mean_patches(out.patches, out.grids)
    parts.append([mean, out.prefix[:, 0] if cls else out.pooled])
    for layer in layers:
      if cls:
        token = final_norm(encoder, out.prefix_layers[layer][:, 0])
      else:
        token = final_norm(encoder, out.layers[layer])
        token = mean_patches(token, out.grids)
      parts[-1].append(token)
  mean, *tokens = map(np.concatenate, zip(*parts, strict=True))
  return LastBlocks(tokens=tuple(tokens), mean=mean)


def final_norm(
  encoder: Encoder, x: Float32[np.ndarray, "*n d"]
) -> Float32[np.ndarray, "*n d"]:
  """Tokens of a block through the norm after the last block, if it has one."""
  spec = encoder.spec.image
  norm = stack_lib.final_norm(spec, np.float32)
  if not spec.final_norm:
    return norm(x)
  params = jax.tree.map(np.asarray, encoder.params["image"]["norm"])
  return np.asarray(norm.apply({"params": params}, x))
