"""Image embeddings for classification: pooled, CLS or mean-patch features.

Evaluations share forward passes: features are cached per encoder, by data hash
and preprocessing, and freed with the encoder.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import (
  OUTPUTS,
  ImageFeatures,
  block_index,
  check_outputs,
  mean_patches,
)
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core.examples import ClassificationSet, select_images
from mtv_jax.models import stack as stack_lib
from mtv_jax.utils.errors import InputError

ViewName = Literal[
  "center", "shortest", "squash_center", "squash", "encoder", "open_clip"
]
Feature = Literal["pooled", "cls", "mean"]
PixelSource = Literal["images", "crops"]

# Resize factor before the crop, and further `Preprocess` fields, by view.
_CENTER = {
  "resize": "shortest",
  "interpolation": "bicubic",
  "crop": "center",
  "crop_rounding": "nearest",
}
_VIEWS = {
  "center": (256 / 224, _CENTER),
  "shortest": (1, _CENTER),
  "squash_center": (256 / 224, {"crop": "center", "antialias": False}),
  "squash": (1, {"antialias": False}),
}

# Bytes of patch tokens encoded before they are averaged.
_CHUNK_BYTES = 2**29

# Copies of encoders with a protocol's preprocessing, by the original, so that
# each copy's features are cached once.
_views: weakref.WeakKeyDictionary[Encoder, dict[Preprocess, Encoder]] = (
  weakref.WeakKeyDictionary()
)


def with_view(encoder: Encoder, name: ViewName) -> Encoder:
  """The encoder with the preprocessing of a protocol.

  `encoder`        the encoder's preprocessing
  `open_clip`      the same with torchvision's center crop, which rounds half an
                   odd margin where `transformers` floors it
  `center`         DINOv2's and MAE's: the shorter side to 256/224 of the input
                   size (bicubic, antialiased), then torchvision's center crop
  `shortest`       DINOv2's for logistic regression: as `center`, with the
                   shorter side to the input size
  `squash_center`  big_vision's for zero-shot and few-shot evaluations,
                   `resize(256)|central_crop(224)`: both sides to 256/224 of the
                   input size (bilinear, not antialiased, as
                   `tf.image.resize`), then a center crop
  `squash`         big_vision's for retrieval, `resize(224)`, without a crop
  """
  if name == "encoder":
    return encoder
  base = encoder.preprocess
  if name == "open_clip":
    preprocess = dataclasses.replace(base, crop_rounding="nearest")
  else:
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
  pixels: PixelSource = "images",
) -> Float32[np.ndarray, "n d"]:
  """One vector per image, not normalised.

  `feature` is `pooled`, the encoder's embedding (attention pooling, projected
  CLS token, ...); `cls`, the CLS token, or `mean`, the mean of the patch
  tokens, both after the final norm. `pixels` are `images`, which the encoder
  preprocesses and whose features are cached, except `mean`; or `crops`, which
  have the input size and are only normalised.
  """
  if feature == "cls" and not encoder.spec.image.cls_token:
    raise InputError(
      f"feature='cls': {encoder!r} has no CLS token; take 'pooled' or 'mean'"
    )
  if feature == "mean":
    options = {"batch_size": batch_size, "pixels": pixels}
    return last_blocks(encoder, data.images, **options).mean
  encode = functools.partial(encode_images, encoder, digest=data.digest)
  if pixels == "crops":
    encode = encoder.dense
  output = {"pooled": "pooled", "cls": "prefix"}[feature]
  out = encode(data.images, outputs=(output,), batch_size=batch_size)
  return out.pooled if feature == "pooled" else out.prefix[:, 0]


@dataclasses.dataclass(frozen=True)
class LastBlocks:
  """Features of the last blocks for linear probes."""

  # One array per block, last block first: the CLS token after the final norm.
  # Without CLS tokens: the embedding for the last block, the mean patch token
  # after the final norm for earlier blocks.
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
  pixels: PixelSource = "images",
) -> LastBlocks:
  """Tokens of the last blocks, and the mean patch.

  Patches are averaged chunk by chunk, to bound memory.
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
    chunk_indices = range(start, min(start + chunk, len(images)))
    out = run(
      select_images(images, chunk_indices),
      layers=layers,
      outputs=("patches", "prefix" if cls else "pooled"),
      batch_size=batch_size,
    )
    mean = mean_patches(out.patches, out.grids)
    parts.append([mean, out.prefix[:, 0] if cls else out.pooled])
    for layer in layers:
      if cls:
        parts[-1].append(final_norm(encoder, out.prefix_layers[layer][:, 0]))
      else:
        token = final_norm(encoder, out.layers[layer])
        parts[-1].append(mean_patches(token, out.grids))
  mean, *tokens = map(np.concatenate, zip(*parts, strict=True))
  return LastBlocks(tokens=tuple(tokens), mean=mean)


def final_norm(encoder: Encoder, x: Float32[np.ndarray, "*n d"]) -> np.ndarray:
  """Applies the encoder's final norm, if any, to tokens of a block."""
  spec = encoder.spec.image
  norm = stack_lib.final_norm(spec, np.float32)
  if not spec.final_norm:
    return norm(x)
  params = jax.tree.map(np.asarray, encoder.params["image"]["norm"])
  return np.asarray(norm.apply({"params": params}, x))


# Cache size per encoder in bytes: 1.28 M embeddings of ViT-B, or patches of
# 7,000 images at 14 x 14. Eviction depends only on use: all hosts of a pod must
# evict equal arrays, since they recompute them together.
BUDGET = 4 * 2**30

# Hash of the data, preprocessing, field of `ImageFeatures`, block.
_Key = tuple[str, Preprocess | None, str, int]
_LAYER_FIELDS = ("layers", "prefix_layers")

log = logging.getLogger(__name__)


class _Store(collections.OrderedDict[_Key, np.ndarray]):
  """LRU cache of arrays."""

  is_warned = False

  def get(self, key: _Key) -> np.ndarray | None:
    if key in self:
      self.move_to_end(key)
    return super().get(key)

  def put(self, key: _Key, array: np.ndarray) -> None:
    self[key] = array
    # An array larger than the budget evicts only itself.
    self.move_to_end(key, last=array.nbytes <= BUDGET)
    while sum(a.nbytes for a in self.values()) > BUDGET:
      evicted, array = self.popitem(last=False)
      if not self.is_warned:
        log.warning(
          "features of an encoder exceed the cache of %.2g GB: %s %s of the "
          "data %s is the first to be evicted and will be computed again",
          BUDGET / 1e9, evicted[2], array.shape, evicted[0],
        )  # fmt: skip
      self.is_warned = True


_stores: weakref.WeakKeyDictionary[Encoder, _Store] = (
  weakref.WeakKeyDictionary()
)


def encode_images(
  encoder: Encoder,
  images: Sequence[Any] | np.ndarray,
  *,
  digest: str,
  layers: Sequence[int] = (),
  outputs: Sequence[str] = ("pooled",),
  batch_size: int = 64,
) -> ImageFeatures:
  """Cached `encoder.image`: computes only missing outputs.

  Returned arrays are shared, so they are read-only. Arguments are as for
  `Encoder.image`; `digest` is a hash of the images and their order.
  """
  check_outputs(outputs)
  # A user may change an encoder's preprocessing.
  data_key = (digest, getattr(encoder, "preprocess", None))
  depth = encoder.spec.image.depth if layers else 0
  blocks = {i: block_index(i, depth) for i in layers}
  store = _stores.setdefault(encoder, _Store())
  arrays = {(name, 0): store.get((*data_key, name, 0)) for name in outputs}
  for field in _LAYER_FIELDS:
    for block in blocks.values():
      arrays[field, block] = store.get((*data_key, field, block))
  missing = [key for key, array in arrays.items() if array is None]
  if missing:
    uncached = {block for name, block in missing if name in _LAYER_FIELDS}
    out = encoder.image(
      images,
      layers=tuple(sorted(uncached)),
      outputs=tuple(name for name, _ in missing if name not in _LAYER_FIELDS),
      batch_size=batch_size,
    )
    # Stored last, so that requested arrays don't evict each other.
    for name, block in missing:
      value = getattr(out, name)
      array = value[block] if name in _LAYER_FIELDS else value
      array.setflags(write=False)
      arrays[name, block] = array
      store.put((*data_key, name, block), array)
  for array in arrays.values():
    if len(array) != len(images):
      raise InputError(
        f"{len(images)} images have the digest {digest!r}, and {len(array)} "
        "were encoded before: it must depend on which images are used"
      )
  return ImageFeatures(
    **{name: arrays.get((name, 0)) for name in OUTPUTS},
    **{
      field: {i: arrays[field, block] for i, block in blocks.items()}
      for field in _LAYER_FIELDS
    },
  )
