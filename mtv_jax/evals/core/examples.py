"""Data set types of the evaluations.

Images keep their original sizes and are decoded on access; labels, captions,
boxes and keypoints are in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8

from mtv_jax.data import canvas
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.path import fetch

# A path, `scenes`, or a source config as in `config.data.train`.
Data = str | os.PathLike | Mapping[str, Any]

# Label of ignored pixels.
IGNORE = 255


class LazySequence(Sequence):
  """Sequence of `count` arrays, read by `read(index)` on access; thread-safe.

  Items are uint8 images `[h, w, 3]`, class maps `[h, w]` or depth maps in
  metres; sizes may differ.
  """

  def __init__(self, read: Callable[[int], Any], count: int):
    self._read = read
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < self._count:
      raise IndexError(f"{index} of {self._count} items")
    return self._read(index)


def read_image(path: str | os.PathLike) -> UInt8[np.ndarray, "h w 3"]:
  """Reads an image file."""
  return canvas.decode(fetch(path).read_bytes(), key=os.fspath(path))


def open_items(
  items: Sequence[Any], read: Callable[[Any], np.ndarray] = read_image
) -> LazySequence:
  """Reads items lazily, in order; by default, image files."""
  return LazySequence(lambda i: read(items[i]), len(items))


def hash_rows(rows: Iterable[Iterable[Any]]) -> str:
  """First 16 hex digits of the SHA-256 of rows."""
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps([str(v) for v in row]).encode() + b"\n")
  return digest.hexdigest()[:16]


def select_images(
  images: Sequence[Any], indices: Sequence[int] | Int[np.ndarray, " m"]
) -> LazySequence:
  """Selects images by index, lazily."""
  return open_items([int(i) for i in indices], images.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
  """Images of a data set; subclasses add labels."""

  name: str  # in protocols
  images: LazySequence
  digest: str  # hash of names, file sizes and labels
  # The set that these images were selected from, and their indices in it.
  whole: ImageSet | None = None
  rows: Int[np.ndarray, " n"] | None = None

  @functools.cached_property
  def content(self) -> str:
    """Hash of `digest` and of the pixels of up to 64 images, evenly spaced.

    `digest` alone for scenes, since it covers all they are rendered from.
    """
    if self.name == "scenes":
      return self.digest
    rows: list[tuple] = [(self.digest, len(self.images))]
    for i in subsample(range(len(self.images)), 64):
      try:
        image = np.ascontiguousarray(self.images[i])
        pixels = hashlib.sha256(image.data).hexdigest()
        rows.append((i, *image.shape, pixels))
      except Exception as error:  # Evaluations raise it.
        rows.append((i, type(error).__name__))
    return hash_rows(rows)

  @classmethod
  def from_records(
    cls,
    records: Sequence[Any],
    *,
    read: Callable[[Any], np.ndarray],
    hash_key: Callable[[Any], Iterable[Any]],
    prefix: Sequence[Any] = (),
    **fields: Any,
  ) -> Any:
    """Builds a set from records; `read` decodes images on access.

    `hash_key` returns what identifies a record (name, size, labels); `prefix`
    identifies the set.
    """
    rows = [prefix] if prefix else []
    digest = hash_rows(itertools.chain(rows, map(hash_key, records)))
    return cls(images=open_items(records, read), digest=digest, **fields)

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    count = len(self.images)
    return {"data": self.name, "data_hash": self.digest, "images": count}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationSet(ImageSet):
  """Images with one class each."""

  labels: Int[np.ndarray, " n"]  # indices into `classes` and `ids`
  classes: tuple[str, ...] | None  # readable names, if known
  ids: tuple[str, ...] | None  # class ids that a prompt file may use
  templates: tuple[str, ...] | None = None  # the data set's own prompts
  # Whether only these classes of a prompt file are candidates (ImageNet-A).
  subset: bool = False
  # ImageNet labels of each class (ObjectNet).
  groups: tuple[tuple[int, ...], ...] | None = None
  # All correct ImageNet labels of each image (ReaL); empty if none is correct.
  accepted: tuple[tuple[int, ...], ...] | None = None

  def select(self, indices: Int[np.ndarray, " m"]) -> ClassificationSet:
    """Selects images; the hash depends on `indices`."""
    if np.array_equal(indices, np.arange(len(self.labels))):
      return self
    return dataclasses.replace(
      self,
      whole=self,
      rows=indices,
      images=select_images(self.images, indices),
      labels=self.labels[indices],
      accepted=self.accepted
      and tuple(self.accepted[i] for i in indices.tolist()),
      digest=hash_rows([(self.digest, *indices.tolist())]),
    )


@dataclasses.dataclass(frozen=True)
class Splits:
  """Disjoint training and test images of a probe, with shared classes."""

  train: ClassificationSet
  test: ClassificationSet
  classes: int
  scored: Sequence[int]  # classes among which test images are scored

  @functools.cached_property
  def penalty(self) -> Float32[np.ndarray, " c"]:
    """Added to the scores of test images: -inf for classes not in `scored`."""
    penalty = np.full(self.classes, -np.inf, np.float32)
    penalty[list(self.scored)] = 0
    return penalty

  def protocol(self) -> dict[str, Any]:
    """Protocol entries."""
    train = self.train.protocol().items()
    protocol = {f"train_{name}": value for name, value in train}
    protocol["classes"] = self.classes
    if len(self.scored) < self.classes:
      protocol["classes_scored"] = len(self.scored)
    return {**self.test.protocol(), **protocol}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionSet(ImageSet):
  """Images with captions, at least one each."""

  captions: tuple[str, ...]  # in the order of their images
  owner: Int[np.ndarray, " m"]  # the image of each caption
  split: str | None = None  # Karpathy split, if any

  @classmethod
  def from_records(
    cls,
    records: Sequence[Any],
    *,
    captions: Callable[[Any], tuple[str, ...]],
    **fields: Any,
  ) -> Any:
    """As in the base class; `captions` returns a record's captions."""
    texts = [captions(record) for record in records]
    if not texts:
      raise InputError(f"{fields['name']}: no image has a caption")
    owner = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    return super().from_records(
      records,
      captions=tuple(text for group in texts for text in group),
      owner=owner.astype(np.int32),
      **fields,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionSet(ImageSet):
  """Items of i images and c captions; image k matches caption k."""

  image_index: Int[np.ndarray, "n i"]  # indices into `images`
  captions: tuple[str, ...]  # c per item
  categories: tuple[str, ...]  # one per item


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSet(ImageSet):
  """Images with one map each, of the image's size: `[h, w]` or `[h, w, c]`."""

  kind: str  # data set kind; published sizes, limits and crops depend on it
  maps: LazySequence

  def read_pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads image `i` and its map."""
    image, pixels = self.images[i], self.maps[i]
    self.check_size(i, image.shape[:2], pixels)
    return image, pixels

  def check_size(
    self, i: int, size: tuple[int, ...], pixels: np.ndarray
  ) -> None:
    """Raises InputError if the sizes of image `i` and its map differ."""
    if size != pixels.shape[:2]:
      raise InputError(
        f"{self.name}: image {i} is {list(size)}, but its map is "
        f"{list(pixels.shape)}; expected the same size"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationSet(DenseSet):
  """Images with class maps; unlabelled pixels are `IGNORE`."""

  classes: tuple[str, ...] | None  # readable names, if known
  class_count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSet(DenseSet):
  """Images with depth maps in metres; unknown depth is 0."""

  source: str  # origin of the depth, for the protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalSet(DenseSet):
  """Images with surface normals `[h, w, 3]`; unknown normals are NaN.

  All normals of a set are in one camera frame, such as x right, y down, z
  forward.
  """

  source: str  # origin of the normals, for the protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxSet(ImageSet):
  """Images with named boxes, at least one each."""

  # (y0, x0, y1, x1) in the unit square, one array per image.
  boxes: tuple[Float32[np.ndarray, "_ 4"], ...]
  phrases: tuple[tuple[str, ...], ...]  # one tuple per image, one item per box
  # Indices into `classes`, one array per image; None if only phrases exist.
  labels: tuple[Int[np.ndarray, " _"], ...] | None
  classes: tuple[str, ...] | None
  # All boxes of each image, if every phrase describes one box (RefCOCO).
  candidates: tuple[Float32[np.ndarray, "_ 4"], ...] | None = None
  # Classes of the dropped boxes of each image; empty if none were dropped.
  dropped: tuple[tuple[str, ...], ...] = ()
  # Number of dropped boxes, by reason.
  left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class KeyPointPair:
  """Two images of one category and their common keypoints.

  Coordinates are (x, y) in pixels of the stored image.
  """

  category: str  # both objects' category
  viewpoint: int | None  # difference: 0 easy, 1 medium, 2 hard, None unknown
  first: int  # index of the first image
  second: int
  first_points: Float64[np.ndarray, "k 2"]
  second_points: Float64[np.ndarray, "k 2"]
  second_box: Float64[np.ndarray, "4"]  # (x0, y0, x1, y1) of the object
  first_side: int  # longer side of the first image
  second_side: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyPointPairs(ImageSet):
  """Image pairs with semantically corresponding keypoints."""

  layout: str  # `spair` or `scenes`
  pairs: tuple[KeyPointPair, ...]
  metadata: Mapping[str, Any]  # further protocol entries


@dataclasses.dataclass(frozen=True)
class Video:
  """Frames of one size with object masks."""

  name: str
  frames: LazySequence
  masks: LazySequence  # 0 background, 1 to `objects` as in the first frame
  objects: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSet:
  """Videos with masks of the objects in their first frame."""

  kind: str  # `scenes` or `davis`
  name: str
  videos: tuple[Video, ...]
  digest: str  # hash of names and file sizes


def subsample(items: Sequence[Any], count: int | None) -> list[Any]:
  """Selects `count` evenly spaced items, to keep sorted classes balanced."""
  if count is None or count >= len(items):
    return list(items)
  if count < 1:
    raise InputError(f"count={count}; expected at least 1, or None for all")
  return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
