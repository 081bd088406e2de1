"""Image embeddings for classification: pooled, CLS or mean-patch features.

Evaluations share forward passes: features are cached per encoder, by data hash
and preprocessing, in memory and, for commands, in a folder (`share_features`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Float32

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures, mean_patches
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.evals.core.base import Evaluator
from mtv_jax.evals.core.examples import ImageSet, select_images
from mtv_jax.evals.core.feature_cache import (
  BUDGET,
  FeatureCache,
  FeatureFolder,
  spans,
)
from mtv_jax.models import stack as stack_lib
from mtv_jax.parallel.distributed import any_process
from mtv_jax.utils.errors import InputError, UserError

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
  """Returns the encoder with the preprocessing of a protocol.

  `encoder`        the encoder's preprocessing
  `open_clip`      the encoder's, but with torchvision's center crop, which
                   rounds half an odd margin; `transformers` floors it
  `center`         DINOv2's and MAE's: resizes the shorter side to 256/224 of
                   the input size (bicubic, antialiased), torchvision's crop
  `shortest`       DINOv2's for logistic regression: as `center`, but resizes
                   the shorter side to the input size
  `squash_center`  big_vision's for zero-shot and few-shot evaluations,
                   `resize(256)|central_crop(224)`: resizes both sides to
                   256/224 of the input size (bilinear, not antialiased, as
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
    _caches[copies[preprocess]] = feature_cache(encoder)
  return copies[preprocess]


def embed(
  encoder: Encoder,
  data: ImageSet,
  *,
  feature: Feature = "pooled",
  batch_size: int = 64,
  pixels: PixelSource = "images",
) -> Float32[np.ndarray, "n d"]:
  """One vector per image, not normalised.

  `feature` is `pooled`, the encoder's embedding (attention pooling, projected
  CLS token, ...); `cls`, the CLS token, or `mean`, the mean of the patch
  tokens, both after the final norm. `pixels` are `images`, which the encoder
  preprocesses and whose features are cached; or `crops`, which have the input
  size and are only normalised.
  """
  if feature == "cls" and not encoder.spec.image.cls_token:
    raise InputError(
      f"feature='cls': {encoder!r} has no CLS token; use 'pooled' or 'mean'"
    )
  options = {"batch_size": batch_size, "pixels": pixels}
  return _compute_features(encoder, data, [feature], **options)[feature]


@dataclasses.dataclass(frozen=True)
class LastBlocks:
  """Features of the last blocks for linear probes."""

  # One array per block, last block first: the CLS token after the final norm.
  # Without CLS tokens: the embedding for the last block, the mean patch token
  # after the final norm for earlier blocks.
  tokens: tuple[Float32[np.ndarray, "n _"], ...]
  # Mean of the last block's patch tokens after the final norm.
  mean: Float32[np.ndarray, "n d"]


def describe_tokens(encoder: Encoder) -> str:
  """Describes `LastBlocks.tokens`, for the protocol."""
  after = " after the final norm" if encoder.spec.image.final_norm else ""
  if encoder.spec.image.cls_token:
    return f"CLS token{after}"
  return f"embedding; of earlier blocks the mean patch{after}"


def block_names(encoder: Encoder, blocks: int) -> list[str]:
  """Names of the features in `LastBlocks`: the tokens, and the mean patch."""
  last = "cls" if encoder.spec.image.cls_token else "pooled"
  depth = encoder.spec.image.depth
  earlier = range(depth - 2, depth - 1 - blocks, -1)
  return [last, *(f"block{i}" for i in earlier), "mean"]


def last_blocks(
  encoder: Encoder,
  data: ImageSet,
  *,
  blocks: int = 1,
  batch_size: int = 64,
  pixels: PixelSource = "images",
) -> LastBlocks:
  """Tokens of the last blocks, and the mean patch; cached as in `embed`."""
  names = block_names(encoder, blocks)
  options = {"batch_size": batch_size, "pixels": pixels}
  vectors = _compute_features(encoder, data, names, **options)
  *tokens, mean = (vectors[name] for name in names)
  return LastBlocks(tuple(tokens), mean)


def final_norm(encoder: Encoder, x: Float32[np.ndarray, "*n d"]) -> np.ndarray:
  """Applies the encoder's final norm, if any, to tokens of a block."""
  spec = encoder.spec.image
  norm = stack_lib.final_norm(spec, np.float32)
  if not spec.final_norm:
    return norm(x)
  params = jax.tree.map(np.asarray, encoder.params["image"]["norm"])
  return np.asarray(norm.apply({"params": params}, x))


# Each encoder's cache, shared with its copies that preprocess differently.
_caches: weakref.WeakKeyDictionary[Encoder, FeatureCache] = (
  weakref.WeakKeyDictionary()
)


def feature_cache(encoder: Encoder) -> FeatureCache:
  """The cache of an encoder's features, freed with the encoder."""
  return _caches.setdefault(encoder, FeatureCache())


def share_features(
  encoder: Encoder,
  evaluators: Iterable[Evaluator],
  folder: FeatureFolder | None = None,
) -> None:
  """Prepares an encoder's cache for evaluations.

  Features that several evaluations need for the same images are computed
  together, in one pass, and kept in `folder`. To repeat a killed run exactly,
  pass the same evaluators.
  """
  cache = feature_cache(encoder)
  cache.folder = folder
  for evaluator in evaluators:
    # An evaluation that does not apply raises this when it runs.
    with contextlib.suppress(UserError):
      for view_encoder, data, names in evaluator.needed_features(encoder):
        view = data.digest, view_encoder.preprocess
        cache.needs.setdefault(view, set()).update(names)


def _compute_features(
  encoder: Encoder,
  data: ImageSet,
  names: Sequence[str],
  *,
  batch_size: int,
  pixels: PixelSource,
) -> dict[str, Float32[np.ndarray, "n _"]]:
  """Returns features by name, read-only and cached except those of crops."""
  options = {"batch_size": batch_size, "pixels": pixels}
  if pixels == "crops":
    return _encode(encoder, data.images, names, **options)
  cache = feature_cache(encoder)
  # A user may change an encoder's preprocessing.
  preprocess = getattr(encoder, "preprocess", None)
  parent = data.whole
  if parent is not None and (parent.digest, preprocess) in cache.needs:
    vectors = _compute_features(encoder, parent, names, **options)
    return {name: x[data.rows] for name, x in vectors.items()}
  view, count = (data.digest, preprocess), len(data.images)
  vectors = {name: cache.get(view, name) for name in names}
  if any(x is None for x in vectors.values()):
    needed, folder = sorted({*names, *cache.needs.get(view, ())}), cache.folder
    if folder is not None or len(needed) > len(names):
      image = encoder.spec.image
      size = 4 * count * len(needed) * max(image.width, image.projection or 0)
      folder = cache.open_folder(size)
      if folder is None and size > BUDGET:
        needed = sorted(names)  # Others would be evicted before use.
    vectors = _encode_spans(encoder, data, names, needed, folder, **options)
    # Stored last, so that requested arrays don't evict each other.
    for name in sorted(vectors, key=lambda name: name in names):
      cache.put(view, name, vectors[name])
  return vectors


def _encode_spans(
  encoder: Encoder,
  data: ImageSet,
  names: Sequence[str],
  needed: Sequence[str],
  folder: FeatureFolder | None,
  **options: Any,
) -> dict[str, Float32[np.ndarray, "n _"]]:
  """Reads `names` from the folder; encodes and writes missing rows.

  If any is missing, encodes all of `needed`, so that features don't depend on
  when a process was killed. Without a folder, returns all of `needed`.
  """
  count = len(data.images)
  if folder is None:
    return _encode(encoder, data.images, needed, **options)
  key, is_first = feature_cache(encoder).key(encoder, data), True
  arrays: dict[str, np.ndarray] = {}  # filled in place, to bound memory
  for span in spans(count, options["batch_size"]):
    part = {name: folder.read(key, name, span) for name in names}
    # On several hosts, all must read the folder to use it.
    if any_process(
      any(x is None or len(x) != len(span) for x in part.values())
    ):
      part = _encode(
        encoder, select_images(data.images, span), needed, **options
      )
      if jax.process_index() == 0:
        if is_first:
          num_rows = count - span.start
          folder.make_room(num_rows * sum(x[0].nbytes for x in part.values()))
        for name, array in part.items():
          folder.write(key, name, span, array)
      is_first = False
    for name in names:
      if name not in arrays:
        arrays[name] = np.empty((count, part[name].shape[1]), np.float32)
      arrays[name][span.start : span.stop] = part[name]
  return arrays


def _encode(
  encoder: Encoder,
  images: Sequence[Any],
  names: Sequence[str],
  *,
  batch_size: int,
  pixels: PixelSource,
) -> dict[str, Float32[np.ndarray, "n _"]]:
  """Encodes features by name; averages patches by chunk, to bound memory."""
  encode = {"images": encoder.image, "crops": encoder.dense}[pixels]
  layers = sorted((_block(n) for n in names if n[:5] == "block"), reverse=True)
  outputs = {"pooled": "pooled", "cls": "prefix", "mean": "patches"}
  chunk = len(images)
  if layers or "mean" in names:
    spec = encoder.spec.image
    grid = encoder.preprocess.size // spec.patch_size
    nbytes = 4 * (1 + len(layers)) * grid**2 * spec.width
    chunk = max(batch_size, _CHUNK_BYTES // nbytes // batch_size * batch_size)
  parts = []
  for start in range(0, len(images), chunk):
    out = encode(
      select_images(images, range(start, min(start + chunk, len(images)))),
      layers=layers,
      outputs=[output for name, output in outputs.items() if name in names],
      batch_size=batch_size,
    )
    parts.append([_select_feature(encoder, out, name) for name in names])
  columns = map(np.concatenate, zip(*parts, strict=True))
  return dict(zip(names, columns, strict=True))


def _select_feature(
  encoder: Encoder, out: ImageFeatures, name: str
) -> Float32[np.ndarray, "n _"]:
  """Selects a feature by name from the encoder's outputs."""
  if name == "pooled":
    return out.pooled
  if name == "cls":
    return out.prefix[:, 0]
  if name == "mean":
    return mean_patches(out.patches, out.grids)
  if encoder.spec.image.cls_token:
    return final_norm(encoder, out.prefix_layers[_block(name)][:, 0])
  tokens = final_norm(encoder, out.layers[_block(name)])
  return mean_patches(tokens, out.grids)


def _block(name: str) -> int:
  return int(name.removeprefix("block"))
