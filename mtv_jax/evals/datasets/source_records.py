"""Evaluation data sets from training sources."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mtv_jax.data import canvas
from mtv_jax.data import registry as sources
from mtv_jax.data.records import BadRecord, NoRecordsError
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.data.scenes.world import CLASS_NAMES
from mtv_jax.evals.core import examples
from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.datasets import scenes
from mtv_jax.parallel.distributed import gather_results
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import map_ahead

log = logging.getLogger(__name__)


def source_config(data: examples.Data, *, length: int) -> dict[str, Any] | None:
  """Config of a source; None for files and folders."""
  if isinstance(data := sources.parse_tfds(data), Mapping):
    return dict(data)
  text = os.fspath(data)
  if not text:  # pathlib reads "" as the working directory.
    raise InputError("data is empty; expected 'scenes', a file or a folder")
  if text == "scenes":
    return {"type": "scenes", "length": length}
  suffixes = (".tar", ".parquet", ".array_record")
  if text.startswith("hf://") or any(s in text for s in suffixes):
    return {"path": text}
  return None


def _split_config(config: Mapping[str, Any], split: str | None) -> dict:
  """Config of a source's split; unchanged for sources without splits."""
  config = dict(config)
  if config.get("type") is None:
    source_split = "train" if split == "train" else "test"
    source = sources.find_source(config.pop("path", ""), split=source_split)
    config |= source
  if config.get("type") == "scenes":
    return scenes.split_config(config, split or "test")
  if config.get("type") == "tfds" and split is not None:
    if split == "train":
      config.setdefault("split", "train")
    elif "split" not in config:
      # ImageNet's and COCO's test sets lack labels.
      config["split"] = "validation"
      try:
        sources.build_source(config)
      except ValueError:
        config["split"] = "test"
  return config


def _open_source(
  config: Mapping[str, Any],
  split: str | None,
  count: int | None,
  *fields: str,
) -> tuple[str, Any, list[int]]:
  """Name, source and evenly spaced record indices; requires `fields`."""
  try:
    config = _split_config(config, split)
    source = sources.build_source(config)
  except NoRecordsError as error:
    raise NotApplicable(str(error)) from error
  name = _source_name(config)
  if config.get("type") == "tfds" and "split" in config:
    name = f"{config.get('name')}/{config['split']}"
  source.keep_blocks(-(-len(source.shards) // jax.process_count()) + 1)
  missing = sorted({*fields} - {*source.fields})
  if missing:
    raise NotApplicable(
      f"{name}: its records have {sorted(source.fields)}, but this evaluation "
      f"needs {' and '.join(map(repr, missing))}"
    )
  return name, source, examples.subsample(range(len(source)), count)


def _source_name(config: Mapping[str, Any]) -> str:
  path = config.get("path") or config["type"]
  if isinstance(path, list):
    path = path[0] if len(path) == 1 else f"{path[0]} ({len(path)} files)"
  return str(path)


class _Row(NamedTuple):
  """A record of a source."""

  index: int
  key: str
  size: str  # bytes of the image's file, or the shape of rendered pixels
  label: Any


def open_images(
  config: Mapping[str, Any], *, count: int | None
) -> examples.ImageSet:
  """Images of a source."""
  name, source, indices = _open_source(config, "test", count)
  rows = _read_rows(source, indices, lambda record: None)
  return _make_set(examples.ImageSet, source, rows, _hash_size, name=name)


def open_labelled(
  config: Mapping[str, Any], *, split: str, count: int | None
) -> examples.ClassificationSet:
  """Images of a source with `label`."""
  name, source, indices = _open_source(config, split, count, "label")
  is_scenes = isinstance(source, SceneSource)
  if is_scenes:
    # Labels of scenes are known without rendering, which is slow.
    size = f"{source.size}x{source.size}x3"
    rows = [_Row(i, source.key(i), size, source.label(i)) for i in indices]
  else:
    rows = _read_rows(source, indices, lambda record: int(record["label"]))
  return _make_set(
    examples.ClassificationSet,
    source,
    rows,
    lambda row: (*_hash_size(row), row.label),
    name=name,
    labels=np.asarray([row.label for row in rows], np.int32),
    classes=CLASS_NAMES if is_scenes else None,
    ids=None,
  )


def open_captions(
  config: Mapping[str, Any], *, count: int | None, max_captions: int | None
) -> examples.CaptionSet:
  """Images of a source with non-empty `captions`."""
  name, source, indices = _open_source(config, "test", count, "captions")
  rows = _read_rows(
    source, indices, lambda record: tuple(record["captions"])[:max_captions]
  )
  return _make_set(
    examples.CaptionSet,
    source,
    [row for row in rows if row.label],
    lambda row: (*_hash_size(row), *row.label),
    name=name,
    captions=lambda row: row.label,
  )


def open_boxes(
  config: Mapping[str, Any], *, count: int | None
) -> examples.BoxSet:
  """Images of a source with non-empty `boxes`, and their `phrases`."""
  name, source, indices = _open_source(config, None, count, "boxes", "phrases")
  if isinstance(source, SceneSource):
    return scenes.open_boxes(name, source, indices)

  def read_label(record: Mapping[str, Any]) -> tuple[np.ndarray, tuple]:
    boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
    return boxes, tuple(record["phrases"])

  rows = _read_rows(source, indices, read_label)
  rows = [row for row in rows if row.label[1]]
  return _make_set(
    examples.BoxSet,
    source,
    rows,
    lambda row: (row.key, *row.label[0].ravel().tolist(), *row.label[1]),
    name=name,
    boxes=tuple(row.label[0] for row in rows),
    phrases=tuple(row.label[1] for row in rows),
    labels=None,
    classes=None,
  )


def _make_set(
  cls: type[examples.ImageSet],
  source: Any,
  rows: Sequence[_Row],
  hash_key: Callable[[_Row], tuple],
  **fields: Any,
) -> Any:
  def read(row: _Row) -> np.ndarray:
    record = source[row.index]
    image = record["image"]
    if isinstance(image, np.ndarray):
      return image
    return canvas.decode(image, key=record["key"])

  return cls.from_records(rows, read=read, hash_key=hash_key, **fields)


def _read_rows(
  source: Any, indices: Sequence[int], read_label: Callable[[Any], Any]
) -> list[_Row]:
  def read(i: int) -> _Row | str:
    try:
      record = source[i]
      image, key = record["image"], record["key"]
      if isinstance(image, np.ndarray):
        size = "x".join(map(str, image.shape))
      else:
        canvas.decode(image, key=key)
        size = str(len(image))
      return _Row(i, key, size, read_label(record))
    except BadRecord as error:
      return str(error)

  # Contiguous shares: a host copies or reads its part of a bucket's shards.
  shares = np.array_split(indices, jax.process_count())
  host_indices = shares[jax.process_index()]
  parts = gather_results(lambda: list(map_ahead(read, host_indices.tolist())))
  rows = [*itertools.chain(*parts)]
  if errors := [row for row in rows if isinstance(row, str)]:
    log.warning(
      f"{source!r}: {len(errors)} of {len(rows)} records are left out of the"
      f" evaluation: {list_first(errors, 3)}"
    )
  return [row for row in rows if not isinstance(row, str)]


def _hash_size(row: _Row) -> tuple[str, str]:
  return row.key, row.size
