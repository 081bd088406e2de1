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

from mtv_jax.encoder import encoder as encoder_lib
from mtv_jax.encoder.encoder import Encoder, ImageFeatures
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.utils.errors import InputError

# Bytes cached for an encoder: 1.28 M embeddings of ViT-B, or patches of 7,000
# images at 14 x 14. Eviction depends on use alone: on a pod all hosts must
# evict the same arrays, as they compute them again together.
BUDGET = 4 * 2**30

# The hash of the data, the preprocessing, the output, and its block.
_Key = tuple[str, Preprocess | None, str, int]

log = logging.getLogger(__name__)


class _Store:
  """Arrays by key; the least recently used are evicted first."""

  def __init__(self):
    self._arrays: collections.OrderedDict[_Key, np.ndarray] = (
      collections.OrderedDict()
    )
    self._bytes = 0
    self._warned = False

  def get(self, key: _Key) -> np.ndarray | None:
    if key in self._arrays:
      self._arrays.move_to_end(key)
    return self._arrays.get(key)

  def put(self, key: _Key, array: np.ndarray) -> None:
    if array.nbytes > BUDGET:
      self._warn(key, array)
      return
    self._arrays[key] = array
    self._bytes += array.nbytes
    while self._bytes > BUDGET:
      old, evicted = self._arrays.popitem(last=False)
      self._bytes -= evicted.nbytes
      self._warn(old, evicted)

  def _warn(self, key: _Key, array: np.ndarray) -> None:
    """Logs the first eviction."""
    if not self._warned:
      log.warning(
        "features of an encoder exceed the cache of %.2g GB: %s %s of the data "
        "%s is the first to be evicted. Evaluations that share such features "
        "compute them again",
        BUDGET / 1e9,
        key[2],
        array.shape,
        key[0],
      )
    self._warned = True


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
  therefore read-only.

  Args:
    encoder: whose features.
    images: as for `Encoder.image`.
    digest: a hash of the images and their order.
    layers: as for `Encoder.image`.
    outputs: as for `Encoder.image`.
    batch_size: as for `Encoder.image`; it changes nothing in the result.

  Raises:
    TypeError, ValueError: as `Encoder.image`.
  """
  encoder_lib.check_outputs(outputs)
  # A user may give an encoder another preprocessing.
  data_key = (digest, getattr(encoder, "preprocess", None))
  names = [(*data_key, name, 0) for name in outputs]
  depth = encoder.spec.image.depth if layers else 0
  taps = {i: encoder_lib.block_index(i, depth) for i in layers}
  names += [
    (*data_key, kind, t) for t in taps.values() for kind in _LAYER_KINDS
  ]
  store = _stores.setdefault(encoder, _Store())
  cached = {name: store.get(name) for name in names}
  missing = [name for name, array in cached.items() if array is None]
  if missing:
    fresh = _compute(encoder, images, missing, batch_size)
    # Last, so that none of the requested arrays evicts another.
    for name in missing:
      fresh[name].setflags(write=False)
      cached[name] = fresh[name]
      store.put(name, fresh[name])
  _check_count(cached, len(images), digest)
  return ImageFeatures(
    **{o: cached.get((*data_key, o, 0)) for o in encoder_lib.OUTPUTS},
    layers={i: cached[*data_key, "layer", t] for i, t in taps.items()},
    prefix_layers={
      i: cached[*data_key, "prefix_layer", t] for i, t in taps.items()
    },
  )


_LAYER_KINDS = ("layer", "prefix_layer")


def _compute(
  encoder: Encoder,
  images: Sequence[Any] | np.ndarray,
  names: Sequence[_Key],
  batch_size: int,
) -> dict[_Key, np.ndarray]:
  taps = sorted({tap for *_, kind, tap in names if kind in _LAYER_KINDS})
  outputs = tuple(kind for *_, kind, _ in names if kind in encoder_lib.OUTPUTS)
  out = encoder.image(
    images, layers=tuple(taps), outputs=outputs, batch_size=batch_size
  )
  data_key = names[0][:2]
  fresh = {(*data_key, name, 0): getattr(out, name) for name in outputs}
  for tap in taps:
    fresh[*data_key, "layer", tap] = out.layers[tap]
    fresh[*data_key, "prefix_layer", tap] = out.prefix_layers[tap]
  return fresh


def _check_count(
  cached: dict[_Key, np.ndarray], count: int, digest: str
) -> None:
  for array in cached.values():
    if len(array) != count:
      raise InputError(
        f"{count} images have the digest {digest!r}, of which {len(array)} "
        "were encoded before: it must depend on which images of a data set "
        "are used"
      )
