"""What an encoder predicts with the heads of its pretraining."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32, PyTree

from mtv_jax.encoder import apply_fns, batched, inputs
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.models.heads.predictors import Predictors


@dataclasses.dataclass(frozen=True)
class Regions:
  """What is in the boxes of n images, m at most.

  Attributes:
    embeddings: `[n, m, E]`, of unit length; zero where there is no box.
    valid: `[n, m]`, which boxes there are.
  """

  embeddings: Float32[np.ndarray, "n m e"]
  valid: Bool[np.ndarray, "n m"]


@dataclasses.dataclass(frozen=True)
class Boxes:
  """Where the phrases of n images are, m at most.

  Attributes:
    boxes: `[n, m, 4]`, (y0, x0, y1, x1) in the unit square of the image; they
      may reach past it, and are zero where there is no phrase.
    valid: `[n, m]`, which phrases there are.
  """

  boxes: Float32[np.ndarray, "n m 4"]
  valid: Bool[np.ndarray, "n m"]


class Predicting:
  """The part of `Encoder` that needs heads: depth, regions, boxes."""

  spec: models.ModelSpec
  params: dict[str, PyTree]
  predictors: Predictors
  preprocess: Preprocess
  mesh: Mesh
  dtype: str

  @property
  def has_depth(self) -> bool:
    """Whether it has the depth head of pretraining."""
    return self.predictors.depth is not None and "depth" in self._heads

  @property
  def has_grounding(self) -> bool:
    """Whether it has the prompter of pretraining, for `ground`."""
    return self.predictors.grounding is not None and "prompter" in self._heads

  @property
  def has_locator(self) -> bool:
    """Whether its pretraining learnt to locate phrases, for `locate`."""
    return self.predictors.grounding is not None and "locator" in self._heads

  def depth(
    self, images: Sequence[Any] | np.ndarray, *, batch_size: int = 16
  ) -> Float32[np.ndarray, "n h w"]:
    """Relative inverse depth `[n, h, w]`.

    Larger is nearer; scale and shift are each image's own. The map covers what
    the encoder saw, which is the whole image where it squashes it. Its size is
    that of training.

    Args:
      images: as for `image`.
      batch_size: as for `image`.

    Raises:
      ValueError: for an encoder without such a head.
    """
    head = self._require(self.has_depth, "depth", self.predictors.depth)
    function = apply_fns.depth_function(self.spec, head, self.dtype, self.mesh)
    return self._predict(function, "depth", images, {}, batch_size)["depth"]

  def ground(
    self,
    images: Sequence[Any] | np.ndarray,
    boxes: Sequence[Any] | np.ndarray,
    *,
    batch_size: int = 16,
  ) -> Regions:
    """Embeddings of what is in boxes, to compare with `text`.

    Args:
      images: as for `image`.
      boxes: for each image `[m, 4]`, (y0, x0, y1, x1) in its unit square; m
        may differ, and may be 0.
      batch_size: as for `image`.

    Raises:
      ValueError: for an encoder without a prompter, or boxes that are none.
    """
    head = self._require(
      self.has_grounding, "grounding", self.predictors.grounding
    )
    padded = _pad(boxes, channels=4, what="the boxes of image")
    function = apply_fns.ground_function(self.spec, head, self.dtype, self.mesh)
    rows = {"boxes": padded.values}
    out = self._predict(function, "ground", images, rows, batch_size)
    found = out["regions"][:, : padded.valid.shape[1]]
    return Regions(found * padded.valid[..., None], padded.valid)

  def locate(
    self,
    images: Sequence[Any] | np.ndarray,
    phrases: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
  ) -> Boxes:
    """A box for each phrase, where pretraining learnt that.

    Args:
      images: as for `image`.
      phrases: for each image, any number of strings.
      batch_size: as for `image`.

    Raises:
      ValueError: for an encoder without a locator.
      TypeError: for anything but a list of strings for each image.
    """
    head = self._require(
      self.has_locator, "grounding with regression", self.predictors.grounding
    )
    inputs.check_phrases(phrases)
    distinct = list(dict.fromkeys(p for own in phrases for p in own))
    texts = dict(zip(distinct, self.text(distinct), strict=True))
    padded = _pad(
      [[texts[phrase] for phrase in own] for own in phrases],
      channels=self.spec.embed_dim,
      what="the phrases of image",
    )
    function = apply_fns.locate_function(self.spec, head, self.dtype, self.mesh)
    rows = {"texts": padded.values}
    out = self._predict(function, "locate", images, rows, batch_size)
    found = out["boxes"][:, : padded.valid.shape[1]]
    return Boxes(found * padded.valid[..., None], padded.valid)

  @property
  def _heads(self) -> Mapping[str, Any]:
    return self.params.get("heads", {})

  def _require(self, there: bool, objective: str, head: Any) -> Any:
    if there:
      return head
    raise ValueError(
      f"{self!r} can't predict this: it has no head of the objective "
      f"{objective}. Its heads are {sorted(self._heads)}, and described are "
      f"{sorted(self.predictors.to_dict())}. Load a run (or a recent export) "
      "that trained with it."
    )

  def _predict(
    self,
    function: apply_fns.Function,
    method: str,
    images: Sequence[Any] | np.ndarray,
    rows: Mapping[str, np.ndarray],
    batch_size: int,
  ) -> dict[str, np.ndarray]:
    """What a head makes of each image and its row of `rows`."""
    inputs.check_images(images, method=method)
    for name, values in rows.items():
      if len(values) != len(images):
        raise ValueError(
          f"Encoder.{method} got {len(images)} images, and {name} of "
          f"{len(values)}"
        )
    if rows and self.preprocess.crop != "none":
      raise ValueError(
        f"Encoder.{method} needs an encoder that sees whole images; this one "
        f"crops them (crop={self.preprocess.crop!r}), and boxes lie elsewhere"
      )
    size = self.preprocess.size

    def prepare(i):
      pixels = self.preprocess(inputs.as_image(images[i], f"image {i}"))
      return {"images": pixels, **{k: v[i] for k, v in rows.items()}}

    blank = {"images": np.zeros((size, size, 3), np.float32)}
    params = {"image": self.params["image"], "heads": dict(self._heads)}
    return batched.in_batches(
      functools.partial(function, params),
      prepare,
      count=len(images),
      blank=blank | {k: np.zeros_like(v[0]) for k, v in rows.items()},
      batch_size=batch_size,
      mesh=self.mesh,
    )


@dataclasses.dataclass(frozen=True)
class _Padded:
  """Lists of several lengths as one array, zero behind each list's end.

  Attributes:
    values: as long as the longest, rounded up to a power of two, so that few
      shapes are compiled.
    valid: as long as the longest.
  """

  values: Float32[np.ndarray, "n k c"]
  valid: Bool[np.ndarray, "n m"]


def _pad(lists: Sequence[Any], *, channels: int, what: str) -> _Padded:
  """Lists of `[m_i, channels]`; m is at least 1."""
  arrays = []
  for i, item in enumerate(lists):
    array = np.asarray(item, np.float32)
    array = array.reshape(-1, channels) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != channels:
      raise ValueError(
        f"{what} {i} must be [m, {channels}]; got {list(array.shape)}"
      )
    if not np.isfinite(array).all():
      raise ValueError(f"{what} {i} hold numbers that are not finite")
    arrays.append(array)
  longest = max([1, *map(len, arrays)])
  length = 1 << (longest - 1).bit_length()
  values = np.zeros((len(arrays), length, channels), np.float32)
  valid = np.zeros((len(arrays), longest), bool)
  for i, array in enumerate(arrays):
    values[i, : len(array)] = array
    valid[i, : len(array)] = True
  return _Padded(values, valid)
