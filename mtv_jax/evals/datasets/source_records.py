"""Data sets of evaluations from the sources that training reads too."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data import registry as sources
from mtv_jax.data.scenes import layout
from mtv_jax.data.scenes.shapes import CLASS_NAMES
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import (
  BoxSet,
  CaptionSet,
  ClassificationSet,
  Digest,
  Images,
  subsample,
)
from mtv_jax.evals.datasets import scenes

# Records read ahead at a time; the bytes of their images are not retained.
_CHUNK = 1024


def split_config(config: Mapping[str, Any], split: str) -> dict[str, Any]:
  """The config of a source's split, if it is a source that has splits."""
  config = dict(config)
  if config.get("type") == "scenes":
    return scenes.split_config(config, split)
  if config.get("type") == "tfds":
    if split == "train":
      config["split"] = "train"
    elif "split" not in config:
      config["split"] = _tfds_test_split(config)
  return config


def _tfds_test_split(config: Mapping[str, Any]) -> str:
  """`validation` where there is one: ImageNet's and COCO's tests are hidden."""
  try:
    sources.build_source({**config, "split": "validation"})
  except ValueError:
    return "test"
  return "validation"


def source_name(config: Mapping[str, Any]) -> str:
  """The name of a source for the protocol."""
  if config["type"] == "tfds" and "split" in config:
    return f"{config.get('name')}/{config['split']}"
  return str(config.get("path", config["type"]))


def open_labelled(
  config: Mapping[str, Any], *, split: str, count: int | None
) -> ClassificationSet:
  """The records' images with their `label`."""
  config = split_config(config, split)
  name, source = source_name(config), sources.build_source(config)
  _require_fields(name, source, "label")
  indices = subsample(range(len(source)), count)
  digest, labels = Digest(), []
  for key, size, label in _labels(source, indices):
    labels.append(label)
    digest.add(key, size, label)
  return ClassificationSet(
    name=name,
    images=_images(source, indices),
    labels=np.asarray(labels, np.int32),
    classes=CLASS_NAMES if isinstance(source, SceneSource) else None,
    ids=None,
    digest=digest.hex(),
  )


def open_captions(
  config: Mapping[str, Any], *, count: int | None, max_captions: int | None
) -> CaptionSet:
  """The records' images that have captions, with their `captions`."""
  config = split_config(config, "test")
  name, source = source_name(config), sources.build_source(config)
  _require_fields(name, source, "captions")
  indices = subsample(range(len(source)), count)
  digest, captions, captioned = Digest(), [], []
  for i, record in zip(indices, _records(source, indices), strict=True):
    texts = tuple(record["captions"])[:max_captions]
    if texts:
      digest.add(record["key"], _size(record["image"]), *texts)
      captioned.append(i)
      captions.append(texts)
  return CaptionSet.from_lists(
    name, _images(source, captioned), captions, digest
  )


def open_boxes(config: Mapping[str, Any], *, count: int | None) -> BoxSet:
  """The records' images that have `boxes`, with their `phrases`."""
  if scenes.is_scenes(config):
    config = scenes.split_config(config, "test")
  name, source = str(config.get("path", config["type"])), None
  source = sources.build_source(config)
  indices = subsample(range(len(source)), count)
  if isinstance(source, SceneSource):
    return scenes.open_boxes(name, source, indices)
  _require_fields(name, source, "boxes", "phrases")
  boxed, boxes, phrases, digest = [], [], [], Digest()
  # Not all at once: a record holds the bytes of its image.
  for i in indices:
    record = source[i]
    if len(record["phrases"]):
      boxed.append(i)
      boxes.append(np.asarray(record["boxes"], np.float32).reshape(-1, 4))
      phrases.append(tuple(record["phrases"]))
      digest.add(record["key"], *boxes[-1].ravel().tolist(), *phrases[-1])
  return BoxSet(
    name=name,
    images=_images(source, boxed),
    boxes=tuple(boxes),
    phrases=tuple(phrases),
    labels=None,
    classes=None,
    digest=digest.hex(),
  )


def _labels(
  source: Any, indices: Sequence[int]
) -> Iterator[tuple[str, str, int]]:
  """Of each record its key, its image's size and its label."""
  if isinstance(source, SceneSource):
    # The label of a scene is known before it is rendered, which is slow.
    size = f"{source.size}x{source.size}x3"
    for i in indices:
      number = source.first + i
      world = layout.sample_world(number, source.seed)
      label = CLASS_NAMES.index(world.objects[0].name)
      yield f"scene-{source.seed}-{number}", size, label
    return
  for record in _records(source, indices):
    yield record["key"], _size(record["image"]), int(record["label"])


def _records(source: Any, indices: Sequence[int]) -> Iterator[Any]:
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(indices), _CHUNK):
      yield from pool.map(source.__getitem__, indices[start : start + _CHUNK])


def _images(source: Any, indices: Sequence[int]) -> Images:
  def read(index: int) -> np.ndarray:
    record = source[indices[index]]
    image = record["image"]
    if isinstance(image, np.ndarray):
      return image
    return canvas.decode(image, key=record["key"])

  return Images(read, len(indices))


def _require_fields(name: str, source: Any, *fields: str) -> None:
  lost = sorted({*fields} - {*source.fields})
  if lost:
    raise NotApplicable(
      f"{name}: its records have {sorted(source.fields)}, and this evaluation "
      f"needs {' and '.join(map(repr, lost))}"
    )


def _size(image: Any) -> str:
  """Bytes of a file, or the shape of rendered pixels."""
  if isinstance(image, np.ndarray):
    return "x".join(map(str, image.shape))
  return str(len(image))
