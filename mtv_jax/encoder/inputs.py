"""What an encoder is given, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from mtv_jax.data import canvas

OUTPUTS = ("pooled", "patches", "prefix")


def layer(index: int, depth: int) -> int:
  """A block counted from 0, of one that may be counted from the end."""
  if not -depth <= index < depth:
    raise ValueError(
      f"layer {index} of an encoder with {depth} blocks; expected 0.."
      f"{depth - 1}, or -{depth}..-1 from the end"
    )
  return index % depth


def check_outputs(outputs: Iterable[str]) -> None:
  """Raises ValueError for outputs that an image tower does not have."""
  unknown = [o for o in outputs if o not in OUTPUTS]
  if unknown or isinstance(outputs, str):
    raise ValueError(f"outputs={outputs!r}; expected some of {OUTPUTS}")


def check_images(images: Any, *, method: str = "image") -> None:
  """Raises TypeError or ValueError for what is no sequence of images."""
  single = isinstance(images, PIL.Image.Image | bytes | str) or (
    isinstance(images, np.ndarray) and images.ndim < 4
  )
  if single:
    raise TypeError(
      f"Encoder.{method} takes a sequence of images and got one "
      f"{type(images).__name__}: pass [image]"
    )
  if not hasattr(images, "__len__"):
    raise TypeError(
      f"Encoder.{method} takes a sequence of images, whose length is known; "
      f"got a {type(images).__name__}: pass list(images)"
    )
  if not len(images):
    raise ValueError(f"Encoder.{method} got no images")


def check_embeddings(image: Any, text: Any) -> None:
  """Raises ValueError for embeddings that can't be compared."""
  if np.ndim(image) != 2 or np.shape(image)[1:] != np.shape(text)[1:]:
    raise ValueError(
      "Encoder.similarity takes embeddings [n, E] and [m, E], such as "
      ".image(images).pooled and .text(strings); got "
      f"{list(np.shape(image))} and {list(np.shape(text))}"
    )


def as_image(item: Any, key: str) -> Any:
  """Whatever form a picture comes in, the pixels that training sees of it.

  Bytes are decoded, and what is open in Pillow treated alike: rotated as its
  EXIF says, on white, 16 bits scaled. Else only uint8 RGB is an image.
  """
  if isinstance(item, bytes):
    return canvas.decode(item, key=key)
  if isinstance(item, PIL.Image.Image):
    return canvas.from_pillow(item, key=key)
  if isinstance(item, str | os.PathLike):
    raise TypeError(
      f"{key} is the path {os.fspath(item)!r}: pass what it holds, such as "
      "pathlib.Path(path).read_bytes()"
    )
  array = np.asarray(item)
  kind = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
  if not kind or not array.size:
    raise TypeError(
      f"{key} must be uint8 [H, W, 3], PIL or encoded bytes; got "
      f"{type(item).__name__} {array.dtype} {list(array.shape)}. Pass pixels "
      "as they were decoded: the encoder resizes and normalises."
    )
  return array


def as_pixels(
  item: Any, key: str, *, size: Sequence[int] | None = None
) -> np.ndarray:
  """Pixels that are to be encoded as they are, of `size` if that is given.

  Raises:
    TypeError: for what is neither uint8 nor float32 `[H, W, 3]`.
    ValueError: for another size than that of the other images.
  """
  array = item if isinstance(item, np.ndarray) else None
  if (
    array is None
    or array.dtype not in (np.uint8, np.float32)
    or array.ndim != 3
    or array.shape[-1] != 3
    or not array.size
  ):
    got = type(item).__name__
    if array is not None:
      got += f" {array.dtype} {list(array.shape)}"
    raise TypeError(
      f"{key} must be an array [H, W, 3], uint8 or float32 in 0..255; got "
      f"{got}. Encoder.dense resizes nothing; Encoder.image takes any image."
    )
  if size is not None and array.shape[:2] != tuple(size):
    raise ValueError(
      f"{key} is {array.shape[0]}x{array.shape[1]} and the first one "
      f"{size[0]}x{size[1]}; Encoder.dense takes images of one size: resize, "
      "or call it once a size"
    )
  return array


def check_phrases(phrases: Any) -> None:
  """Raises TypeError for what is not a list of strings for each image."""
  for own in [phrases, *phrases] if isinstance(phrases, list | tuple) else "x":
    if not isinstance(own, list | tuple):
      raise TypeError(
        "Encoder.locate takes a list of phrases for each image: pass "
        f"[[phrase, ...], ...]; got a {type(own).__name__} {own!r:.40}"
      )
