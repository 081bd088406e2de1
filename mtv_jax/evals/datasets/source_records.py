"""Data sets of evaluations from the sources of training."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data import registry as sources
from mtv_jax.data.scenes.shapes import CLASS_NAMES
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import scenes
from mtv_jax.utils.cores import available_cores

# Records read ahead at a time; the bytes of their images are not retained.
_CHUNK = 1024


def split_config(config: Mapping[str, Any], split: str) -> dict[str, Any]:
  """The config of a source's split; unchanged for sources without splits."""
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
  """`validation` if it exists: ImageNet's and COCO's tests have no labels."""
  try:
    sources.build_source({**config, "split": "validation"})
  except ValueError:
    return "test"
  return "validation"


def _open(
  config: Mapping[str, Any], count: int | None, *fields: str
) -> tuple[str, Any, list[int]]:
  """Name, source and evenly spaced indices of records with `fields`."""
  name = str(config.get("path", config["type"]))
  if config["type"] == "tfds" and "split" in config:
    name = f"{config.get('name')}/{config['split']}"
  source = sources.build_source(config)
  missing = sorted({*fields} - {*source.fields})
  if missing:
    raise NotApplicable(
      f"{name}: its records have {sorted(source.fields)}, and this evaluation "
      f"needs {' and '.join(map(repr, missing))}"
    )
  return name, source, examples.subsample(range(len(source)), count)


def open_images(
  config: Mapping[str, Any], *, count: int | None
) -> examples.ImageSet:
  """The records' images."""
  name, source, indices = _open(split_config(config, "test"), count)
  digest = examples.Digest()
  for _, record in _read_records(source, indices):
    digest.add(record["key"], _describe_size(record["image"]))
  return examples.ImageSet(
    name=name, images=_images(source, indices), digest=digest.hex()
  )


def open_labelled(
  config: Mapping[str, Any], *, split: str, count: int | None
) -> examples.ClassificationSet:
  """The records' images with their `label`."""
  config = split_config(config, split)
  name, source, indices = _open(config, count, "label")
  digest, labels = examples.Digest(), []
  for key, size, label in _read_labels(source, indices):
    labels.append(label)
    digest.add(key, size, label)
  return examples.ClassificationSet(
    name=name,
    images=_images(source, indices),
    labels=np.asarray(labels, np.int32),
    classes=CLASS_NAMES if isinstance(source, SceneSource) else None,
    ids=None,
    digest=digest.hex(),
  )


def open_captions(
  config: Mapping[str, Any], *, count: int | None, max_captions: int | None
) -> examples.CaptionSet:
  """The records' images that have captions, with their `captions`."""
  config = split_config(config, "test")
  name, source, indices = _open(config, count, "captions")
  digest, captions, captioned = examples.Digest(), [], []
  for i, record in _read_records(source, indices):
    texts = tuple(record["captions"])[:max_captions]
    if texts:
      digest.add(record["key"], _describe_size(record["image"]), *texts)
      captioned.append(i)
      captions.append(texts)
  images = _images(source, captioned)
  return examples.CaptionSet.from_lists(name, images, captions, digest)


def open_boxes(
  config: Mapping[str, Any], *, count: int | None
) -> examples.BoxSet:
  """The records' images that have `boxes`, with their `phrases`."""
  if scenes.is_scenes(config):
    config = scenes.split_config(config, "test")
  name, source, indices = _open(config, count, "boxes", "phrases")
  if isinstance(source, SceneSource):
    return scenes.open_boxes(name, source, indices)
  boxed, boxes, phrases, digest = [], [], [], examples.Digest()
  for i, record in _read_records(source, indices):
    if len(record["phrases"]):
      boxed.append(i)
      boxes.append(np.asarray(record["boxes"], np.float32).reshape(-1, 4))
      phrases.append(tuple(record["phrases"]))
      digest.add(record["key"], *boxes[-1].ravel().tolist(), *phrases[-1])
  return examples.BoxSet(
    name=name,
    images=_images(source, boxed),
    boxes=tuple(boxes),
    phrases=tuple(phrases),
    labels=None,
    classes=None,
    digest=digest.hex(),
  )


def _read_labels(
  source: Any, indices: Sequence[int]
) -> Iterator[tuple[str, str, int]]:
  """Key, image size and label of each record."""
  if isinstance(source, SceneSource):
    # The label of a scene is known before it is rendered, which is slow.
    size = f"{source.size}x{source.size}x3"
    for i in indices:
      yield source.key(i), size, source.label(i)
    return
  for _, record in _read_records(source, indices):
    size = _describe_size(record["image"])
    yield record["key"], size, int(record["label"])


def _read_records(
  source: Any, indices: Sequence[int]
) -> Iterator[tuple[int, Any]]:
  with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
    for start in range(0, len(indices), _CHUNK):
      chunk = indices[start : start + _CHUNK]
      yield from zip(chunk, pool.map(source.__getitem__, chunk), strict=True)


def _images(source: Any, indices: Sequence[int]) -> examples.Images:
  def read(index: int) -> np.ndarray:
    record = source[indices[index]]
    image = record["image"]
    if isinstance(image, np.ndarray):
      return image
    return canvas.decode(image, key=record["key"])

  return examples.Images(read, len(indices))


def _describe_size(image: Any) -> str:
  """Bytes of a file, or the shape of rendered pixels."""
  if isinstance(image, np.ndarray):
    return "x".join(map(str, image.shape))
  return str(len(image))
