"""What an evaluation's data set gives: images read late, labels, captions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mtv_jax.data import canvas

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Late(Sequence):
  """Arrays that are read when indexed, from any thread.

  Args:
    read: number to array.
    count: how many there are.
  """

  what = "item"

  def __init__(self, read: Callable[[int], Any], count: int):
    self._read = read
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> np.ndarray:
    if not 0 <= index < self._count:
      raise IndexError(f"{self.what} {index} of {self._count}")
    return self._read(index)


class Images(Late):
  """uint8 images `[h, w, 3]`, each of its own size."""

  what = "image"


def files(paths: Sequence[str | os.PathLike]) -> Images:
  """The images of files, in their order."""

  def read(index: int) -> np.ndarray:
    with open(paths[index], "rb") as file:
      return canvas.decode(file.read(), key=os.fspath(paths[index]))

  return Images(read, len(paths))


def subset(
  images: Sequence[Any], chosen: Sequence[int] | Int[np.ndarray, " m"]
) -> Images:
  """Some of the images, in the order of `chosen`."""
  chosen = [int(i) for i in chosen]
  return Images(lambda i: images[chosen[i]], len(chosen))


@dataclasses.dataclass(frozen=True)
class Labelled:
  """Images with one class each.

  Attributes:
    name: what it is, for the protocol.
    images: n of them.
    labels: `[n]`, indices into `classes` and `ids`.
    classes: readable names, or None if the data has none.
    ids: identifiers by which a prompt file may know the classes.
    digest: hash of names, file sizes and labels.
  """

  name: str
  images: Images
  labels: Int[np.ndarray, " n"]
  classes: tuple[str, ...] | None
  ids: tuple[str, ...] | None
  digest: str

  def select(self, chosen: Int[np.ndarray, " m"]) -> Labelled:
    """Some of the images, with a hash that says which."""
    digest = Digest()
    digest.add(self.digest, *chosen.tolist())
    return dataclasses.replace(
      self,
      images=subset(self.images, chosen),
      labels=self.labels[chosen],
      digest=digest.hex(),
    )


@dataclasses.dataclass(frozen=True)
class Captioned:
  """Images with captions.

  Attributes:
    name: what it is, for the protocol.
    images: n of them, each with at least one caption.
    captions: m of them, in the order of their images.
    owner: `[m]`, the image of each caption.
    digest: hash of names, file sizes and captions.
    split: which of Karpathy's; None for other data, which has no choice.
  """

  name: str
  images: Images
  captions: tuple[str, ...]
  owner: Int[np.ndarray, " m"]
  digest: str
  split: str | None = None


def captioned(
  name: str,
  images: Images,
  captions: Sequence[tuple[str, ...]],
  digest: Digest,
) -> Captioned:
  """Images and the captions of each."""
  if not captions:
    raise ValueError(f"{name}: no image has a caption")
  owner = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
  return Captioned(
    name=name,
    images=images,
    captions=tuple(c for own in captions for c in own),
    owner=owner.astype(np.int32),
    digest=digest.hex(),
  )


def spaced(items: Sequence[Any], count: int | None) -> list[Any]:
  """`count` of the items, evenly spaced, so that every class has its part."""
  if count is None or count >= len(items):
    return list(items)
  if count < 1:
    raise ValueError(f"count={count}; expected at least 1, or None for all")
  return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


class Digest:
  """SHA-256 of rows, 16 hexadecimal digits: enough to tell two sets apart."""

  def __init__(self):
    self._hash = hashlib.sha256()

  def add(self, *row: Any) -> None:
    self._hash.update(json.dumps([str(v) for v in row]).encode() + b"\n")

  def hex(self) -> str:
    return self._hash.hexdigest()[:16]
