"""Labelled and captioned images from the sources that training reads too."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data.scenes import layout as scene_layout
from mtv_jax.data.scenes import scenes
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  Captioned,
  Digest,
  Images,
  Labelled,
  spaced,
)

# Records read ahead at a time, of which an image's bytes are not kept.
_CHUNK = 1024


def labelled(name: str, source: Any, *, count: int | None) -> Labelled:
  """The records' images with their `label`."""
  _require_field(name, source, "label")
  chosen = spaced(range(len(source)), count)
  digest, labels = Digest(), []
  for key, size, label in _labels(source, chosen):
    labels.append(label)
    digest.add(key, size, label)
  drawn = name == "scenes" or isinstance(source, scenes.SceneSource)
  return Labelled(
    name=name,
    images=_images(source, chosen),
    labels=np.asarray(labels, np.int32),
    classes=tuple(scenes.CLASS_NAMES) if drawn else None,
    ids=None,
    digest=digest.hex(),
  )


def captioned(
  name: str, source: Any, *, count: int | None, max_captions: int | None
) -> Captioned:
  """The records' images that have captions, with their `captions`."""
  _require_field(name, source, "captions")
  chosen, kept = spaced(range(len(source)), count), []
  digest, captions = Digest(), []
  for i, record in zip(chosen, _records(source, chosen), strict=True):
    own = tuple(record["captions"])[:max_captions]
    if own:
      digest.add(record["key"], _size(record["image"]), *own)
      kept.append(i)
      captions.append(own)
  return examples.captioned(name, _images(source, kept), captions, digest)


def _labels(
  source: Any, chosen: Sequence[int]
) -> Iterator[tuple[str, str, int]]:
  """Of each record its key, its image's size and its label."""
  if isinstance(source, scenes.SceneSource):
    # What a scene shows is known before it is drawn, which takes long.
    size = f"{source.size}x{source.size}x3"
    for i in chosen:
      number = source.first + i
      world = scene_layout.sample_world(number, source.seed)
      label = scenes.CLASS_NAMES.index(world.things[0].name)
      yield f"scene-{source.seed}-{number}", size, label
    return
  for record in _records(source, chosen):
    yield record["key"], _size(record["image"]), int(record["label"])


def _records(source: Any, chosen: Sequence[int]) -> Iterator[Any]:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(chosen), _CHUNK):
      part = chosen[start : start + _CHUNK]
      yield from pool.map(source.__getitem__, part)


def _images(source: Any, chosen: Sequence[int]) -> Images:
  def read(index: int) -> np.ndarray:
    record = source[chosen[index]]
    image = record["image"]
    if isinstance(image, np.ndarray):
      return image
    return canvas.decode(image, key=record["key"])

  return Images(read, len(chosen))


def _require_field(name: str, source: Any, field: str) -> None:
  if field not in source.fields:
    raise NotApplicable(
      f"{name}: its records have {sorted(source.fields)}, and this evaluation "
      f"needs {field!r}"
    )


def _size(image: Any) -> str:
  """Bytes of a file, or the shape of rendered pixels."""
  if isinstance(image, np.ndarray):
    return "x".join(map(str, image.shape))
  return str(len(image))
