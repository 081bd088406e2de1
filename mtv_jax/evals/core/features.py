"""Cache of image features, so that evaluations share passes over the data.

Features are cached for each encoder by the hash of the data and the
preprocessing, and freed with the encoder.
"""

from __future__ import annotations

import collections
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import (
  OUTPUTS,
  ImageFeatures,
  block_index,
  check_outputs,
)
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.utils.errors import InputError

# Bytes cached for an encoder: 1.28 M embeddings of ViT-B, or patches of 7,000
# images at 14 x 14. Eviction depends on use alone: on a pod all hosts must
# evict the same arrays, as they compute them again together.
BUDGET = 4 * 2**30

# Hash of the data, preprocessing, field of `ImageFeatures`, block.
_Key = tuple[str, Preprocess | None, str, int]
_LAYER_FIELDS = ("layers", "prefix_layers")

log = logging.getLogger(__name__)


class _Store(collections.OrderedDict[_Key, np.ndarray]):
  """Arrays by key; the least recently used are evicted first."""

  is_warned = False

  def get(self, key: _Key) -> np.ndarray | None:
    if key in self:
      self.move_to_end(key)
    return super().get(key)

  def put(self, key: _Key, array: np.ndarray) -> None:
    self[key] = array
    # An array larger than the budget evicts no other.
    self.move_to_end(key, last=array.nbytes <= BUDGET)
    while sum(a.nbytes for a in self.values()) > BUDGET:
      evicted, array = self.popitem(last=False)
      if not self.is_warned:
        log.warning(
          "features of an encoder exceed the cache of %.2g GB: %s %s of the "
          "data %s is the first to be evicted. Evaluations that share such "
          "features compute them again",
          BUDGET / 1e9,
          evicted[2],
          array.shape,
          evicted[0],
        )
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
  """`encoder.image` through the cache.

  Only the outputs that are not cached are computed. The arrays are shared, and
  therefore read-only. Arguments and errors are those of `Encoder.image`;
  `digest` is a hash of the images and their order.
  """
  check_outputs(outputs)
  # A user may give an encoder another preprocessing.
  data_key = (digest, getattr(encoder, "preprocess", None))
  depth = encoder.spec.image.depth if layers else 0
  taps = {i: block_index(i, depth) for i in layers}
  store = _stores.setdefault(encoder, _Store())
  arrays = {(name, 0): store.get((*data_key, name, 0)) for name in outputs}
  for field in _LAYER_FIELDS:
    for tap in taps.values():
      arrays[field, tap] = store.get((*data_key, field, tap))
  missing = [key for key, array in arrays.items() if array is None]
  if missing:
    out = encoder.image(
      images,
      layers=tuple(
        sorted({tap for name, tap in missing if name in _LAYER_FIELDS})
      ),
      outputs=tuple(name for name, _ in missing if name not in _LAYER_FIELDS),
      batch_size=batch_size,
    )
    # Last, so that none of the requested arrays evicts another.
    for name, tap in missing:
      value = getattr(out, name)
      array = value[tap] if name in _LAYER_FIELDS else value
      array.setflags(write=False)
      arrays[name, tap] = array
      store.put((*data_key, name, tap), array)
  for array in arrays.values():
    if len(array) != len(images):
      raise InputError(
        f"{len(images)} images have the digest {digest!r}, of which "
        f"{len(array)} were encoded before: it must depend on which images of "
        "a data set are used"
      )
  return ImageFeatures(
    **{name: arrays.get((name, 0)) for name in OUTPUTS},
    **{
      field: {i: arrays[field, tap] for i, tap in taps.items()}
      for field in _LAYER_FIELDS
    },
  )
