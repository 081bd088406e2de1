"""Features that several evaluations share, computed once.

What an encoder has been asked for is remembered with it, by the hash of the
data and the preprocessing, and forgotten with it: probes over the same images
cost one pass.
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

# Bytes that are kept for an encoder: 1.28 M embeddings of ViT-B, or patches of
# 7,000 images at 14 x 14. For each apart, and by use alone: on a pod all hosts
# must forget the same things, as computing them again is a common effort.
BUDGET = 4 * 2**30

# The hash of the data, the preprocessing, what it is, and of which block.
_Key = tuple[str, Preprocess | None, str, int]

log = logging.getLogger(__name__)


class _Store:
  """Arrays by what they are, the least recently used forgotten first."""

  def __init__(self):
    self._arrays: collections.OrderedDict[_Key, np.ndarray] = (
      collections.OrderedDict()
    )
    self._bytes = 0
    self._told = False

  def get(self, key: _Key) -> np.ndarray | None:
    if key in self._arrays:
      self._arrays.move_to_end(key)
    return self._arrays.get(key)

  def put(self, key: _Key, array: np.ndarray) -> None:
    if array.nbytes > BUDGET:
      self._tell(key, array)
      return
    self._arrays[key] = array
    self._bytes += array.nbytes
    while self._bytes > BUDGET:
      old, lost = self._arrays.popitem(last=False)
      self._bytes -= lost.nbytes
      self._tell(old, lost)

  def _tell(self, key: _Key, array: np.ndarray) -> None:
    """Says once that not all is kept, and so will be computed again."""
    if not self._told:
      log.warning(
        "features of an encoder exceed the %.2g GB that are kept: %s %s of the "
        "data %s is the first to go. Evaluations that share such features "
        "compute them again",
        BUDGET / 1e9,
        key[2],
        array.shape,
        key[0],
      )
    self._told = True


_stores: weakref.WeakKeyDictionary[Encoder, _Store] = (
  weakref.WeakKeyDictionary()
)


def image(
  encoder: Encoder,
  images: Sequence[Any] | np.ndarray,
  *,
  digest: str,
  layers: Sequence[int] = (),
  outputs: Sequence[str] = ("pooled",),
  batch_size: int = 64,
) -> ImageFeatures:
  """`encoder.image`, remembered.

  Of a request that is known in part, the rest is computed. What is returned is
  shared, and therefore read-only.

  Args:
    encoder: whose features.
    images: as for `Encoder.image`.
    digest: a hash that tells which images these are, in their order.
    layers: as for `Encoder.image`.
    outputs: as for `Encoder.image`.
    batch_size: as for `Encoder.image`; it changes nothing in the result.

  Raises:
    TypeError, ValueError: as `Encoder.image`.
  """
  encoder_lib.check_outputs(outputs)
  # A user may give an encoder another preprocessing.
  what = (digest, getattr(encoder, "preprocess", None))
  names = [(*what, name, 0) for name in outputs]
  depth = encoder.spec.image.depth if layers else 0
  taps = {i: encoder_lib.block_index(i, depth) for i in layers}
  names += [(*what, kind, t) for t in taps.values() for kind in _LAYER_KINDS]
  store = _stores.setdefault(encoder, _Store())
  found = {name: store.get(name) for name in names}
  lost = [name for name, array in found.items() if array is None]
  if lost:
    fresh = _compute(encoder, images, lost, batch_size)
    # Last, so that what is wanted now can't push itself out.
    for name in lost:
      fresh[name].setflags(write=False)
      found[name] = fresh[name]
      store.put(name, fresh[name])
  _check_count(found, len(images), digest)
  return ImageFeatures(
    **{o: found.get((*what, o, 0)) for o in encoder_lib.OUTPUTS},
    layers={i: found[*what, "layer", t] for i, t in taps.items()},
    prefix_layers={i: found[*what, "prefix_layer", t] for i, t in taps.items()},
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
  what = names[0][:2]
  fresh = {(*what, name, 0): getattr(out, name) for name in outputs}
  for tap in taps:
    fresh[*what, "layer", tap] = out.layers[tap]
    fresh[*what, "prefix_layer", tap] = out.prefix_layers[tap]
  return fresh


def _check_count(
  found: dict[_Key, np.ndarray], count: int, digest: str
) -> None:
  for array in found.values():
    if len(array) != count:
      raise ValueError(
        f"{count} images are said to be those of the hash {digest!r}, of which "
        f"{len(array)} were encoded before: the hash must tell which images "
        "of a data set are used"
      )
