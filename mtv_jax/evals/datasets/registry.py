"""Readers of labelled and captioned images, in the layouts they come in.

Original images, not canvases: an evaluation chooses its own preprocessing.
Annotations are read when a data set is opened, images one by one when used.

What `data` may be:

  scenes              the built-in scenes, at numbers no training run reaches
  {type=..., ...}     any source of `mtv_jax.data`, as in `config.data.train`
  *.tar               WebDataset shards: brace ranges, globs
  captions.json       COCO's captions, with the folder of images beside it
  dataset_coco.json   Karpathy's splits of COCO or Flickr30k
  FOLDER              CLASS/*.jpg, or flat wnid_name.JPEG; or a folder of them
                      for each split: train and test, val or validation
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mtv_jax.evals.core.base import NotApplicable
from mtv_jax.evals.core.examples import Captioned, Digest, Images, Labelled
from mtv_jax.evals.datasets import caption_files, class_folders, source_records

__all__ = [
  "Captioned",
  "Data",
  "Digest",
  "HELD_OUT_SCENES",
  "Images",
  "Labelled",
  "PROBE_SCENES",
  "Splits",
  "captioned",
  "held_out",
  "is_scenes",
  "labelled",
  "train_and_test",
]

Data = str | os.PathLike | Mapping[str, Any]

# Scenes are rendered from their number; training counts up from zero.
HELD_OUT_SCENES = 1_000_000
# Those that probes train on: neither the encoder's nor those held out.
PROBE_SCENES = 2_000_000
_SCENES = 1000


@dataclasses.dataclass(frozen=True)
class Splits:
  """Images to train a probe on and images to test it on.

  Attributes:
    train: with labels among the same classes as those of `test`.
    test: none of the images of `train`.
    classes: how many there are.
  """

  train: Labelled
  test: Labelled
  classes: int

  def protocol(self) -> dict[str, Any]:
    """What a figure depends on, for JSON."""
    return {
      "data": self.test.name,
      "data_hash": self.test.digest,
      "images": len(self.test.images),
      "train_data": self.train.name,
      "train_data_hash": self.train.digest,
      "train_images": len(self.train.images),
      "classes": self.classes,
    }


def is_scenes(data: Data) -> bool:
  """Whether data are the built-in scenes, for which defaults are small."""
  if isinstance(data, Mapping):
    return data.get("type") == "scenes"
  return os.fspath(data) == "scenes"


def labelled(
  data: Data, *, split: str = "test", count: int | None = None
) -> Labelled:
  """Opens labelled images: scenes, a folder, or a source with labels.

  Args:
    data: see the top of the file.
    split: `train` or `test`, where the data has both: of a folder of splits,
      of the scenes (their numbers then start at `PROBE_SCENES`), and of a TFDS
      set whose split `data` leaves open. Other data are what they are.
    count: how many to use, evenly spaced; all of them by default (of the
      scenes, which never end, 1,000).

  Raises:
    FileNotFoundError: nothing there.
    NotApplicable: something there that has no labels, or whose folders are
      those of another kind of data set.
  """
  if split not in class_folders.SPLITS:
    raise ValueError(f"split={split!r}; expected 'train' or 'test'")
  kind = _kind(data, count, split)
  if kind.source is not None:
    return source_records.labelled(kind.name, kind.source, count=count)
  if kind.what != "folder":
    raise NotApplicable(
      f"{data} is a {kind.what} file, which gives captions and no classes. "
      "Classification reads scenes, CLASS/*.jpg, wnid_name.JPEG or a source "
      "with labels."
    )
  return class_folders.read(kind.path, split=split, count=count)


def train_and_test(
  data: Data,
  *,
  train: Data | None = None,
  count: int | None = None,
  train_count: int | None = None,
) -> Splits:
  """Opens a set to train a probe on and one to test it on.

  Args:
    data: with both splits (a folder of them, the scenes, a TFDS set), or the
      images to test on.
    train: the images to train on, where `data` does not have them.
    count: how many images to test on, evenly spaced; all by default.
    train_count: how many to train on, likewise.

  Raises:
    FileNotFoundError: nothing there, or one split without the other.
    NotApplicable: data of another kind, or without a training split.
    ValueError: classes that don't agree, or one set given twice.
  """
  if not isinstance(data, Mapping) and os.path.isdir(data):
    # First, as other data sets have a folder for training too.
    class_folders.refuse_others(data)
  if train is None and not _knows_splits(data):
    raise NotApplicable(
      f"data={os.fspath(data) if not isinstance(data, Mapping) else data!r} "
      "has nothing to train a probe on. Expected a folder with train/CLASS/"
      "*.jpg and val/CLASS/*.jpg, scenes or a TFDS set; or give the images to "
      "train on with train="
    )
  learned = labelled(
    data if train is None else train, split="train", count=train_count
  )
  tested = labelled(data, split="test", count=count)
  return _matched(learned, tested)


def held_out(
  labels: Int[np.ndarray, " n"], *, every: int = 10
) -> tuple[Int[np.ndarray, " t"], Int[np.ndarray, " h"]]:
  """Splits a training set: every tenth image of each class is held out.

  Of a class with fewer than two images none is. Returns the indices of those
  to train on and those held out, each in order.
  """
  order = np.argsort(labels, kind="stable")
  counts = np.bincount(labels)
  starts = np.repeat(np.cumsum(counts) - counts, counts)
  place = np.arange(len(labels)) - starts
  total = np.repeat(counts, counts)
  # The middle one of each ten, so that a class of two to nine gives one too.
  out = (place % every == np.minimum(every, total) // 2) & (total > 1)
  return np.sort(order[~out]), np.sort(order[out])


def captioned(
  data: Data,
  *,
  images: str | os.PathLike | None = None,
  split: str = "test",
  count: int | None = None,
  max_captions: int | None = None,
) -> Captioned:
  """Opens captioned images: scenes, COCO, Karpathy, or tars.

  Args:
    data: see the top of the file.
    images: the folder of images, where it is not beside the JSON.
    split: of Karpathy's file.
    count: how many images to use, evenly spaced; all of them by default (of
      the scenes, which never end, 1,000).
    max_captions: the first captions of an image to use; all by default.

  Raises:
    FileNotFoundError: nothing there, or images missing.
    NotApplicable: something there that has no captions.
  """
  kind = _kind(data, count)
  if kind.source is not None:
    return source_records.captioned(
      kind.name, kind.source, count=count, max_captions=max_captions
    )
  chosen = {"images": images, "count": count, "max_captions": max_captions}
  if kind.what == "COCO captions":
    return caption_files.coco(kind.path, kind.content, **chosen)
  if kind.what == "Karpathy":
    read = caption_files.karpathy(
      kind.path, kind.content, split=split, **chosen
    )
    return dataclasses.replace(read, split=split)
  raise NotApplicable(
    f"{data} is a folder, which gives no captions. Retrieval reads scenes, "
    "COCO's captions_*.json, Karpathy's dataset_*.json or tars."
  )


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What a `data` argument turned out to be."""

  name: str
  what: str
  path: pathlib.Path | None = None
  content: Any = None
  source: Any = None


def _kind(data: Data, count: int | None, split: str = "test") -> _Kind:
  if isinstance(data, Mapping):
    name = str(data.get("path", data.get("type")))
    return _source_kind(name, _split_of_source(data, split))
  text = os.fspath(data)
  if text == "scenes":
    config = {"type": "scenes", "length": count or _SCENES}
    return _source_kind("scenes", _split_of_source(config, split))
  if ".tar" in text:
    return _source_kind(text, {"type": "webdataset", "path": text})
  path = pathlib.Path(text)
  if path.is_dir():
    return _Kind(text, "folder", path)
  if path.is_file() and path.suffix == ".json":
    return _json_kind(text, path)
  expected = (
    "Expected 'scenes', a folder of classes, COCO's or Karpathy's JSON, or "
    "tars (shards/{00000..00009}.tar)"
  )
  if path.exists():
    raise NotApplicable(f"data={text!r}: a file of another kind. {expected}")
  raise FileNotFoundError(f"data={text!r}: nothing there. {expected}")


def _json_kind(text: str, path: pathlib.Path) -> _Kind:
  try:
    content = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, no object")
  first = (content.get("images") or [{}])[0]
  if "sentences" in first:
    return _Kind(text, "Karpathy", path, content)
  if "annotations" in content:
    return _Kind(text, "COCO captions", path, content)
  raise NotApplicable(
    f"{path} has keys {sorted(content)}; expected COCO's captions (images, "
    "annotations) or Karpathy's splits (images with sentences)"
  )


def _knows_splits(data: Data) -> bool:
  if isinstance(data, Mapping):
    return data.get("type") in ("scenes", "tfds")
  return is_scenes(data) or (
    os.path.isdir(data) and class_folders.has_splits(data)
  )


def _split_of_source(config: Mapping[str, Any], split: str) -> dict[str, Any]:
  """The config of a source's split, where it is a kind that has splits."""
  config = dict(config)
  if config.get("type") == "scenes":
    if split == "train":
      config["first"] = PROBE_SCENES + config.get("first", 0)
    config.setdefault("first", HELD_OUT_SCENES)
  if config.get("type") == "tfds":
    if split == "train":
      config["split"] = "train"
    config.setdefault("split", _tfds_test_split(config))
  return config


def _tfds_test_split(config: Mapping[str, Any]) -> str:
  """`validation` where there is one: ImageNet's and COCO's tests are hidden."""
  from mtv_jax.data.sources import registry as sources

  try:
    sources.build_source({**config, "split": "validation"})
  except ValueError:
    return "test"
  return "validation"


def _source_kind(name: str, config: dict[str, Any]) -> _Kind:
  from mtv_jax.data.sources import registry as sources

  if config["type"] == "tfds":
    name = f"{config.get('name')}/{config['split']}"
  return _Kind(name, config["type"], source=sources.build_source(config))


def _same_place(name: str, other: str) -> bool:
  """Whether names are of one set, also if written in two ways or linked."""
  if name == other == "scenes":
    return False
  return os.path.realpath(name) == os.path.realpath(other)


def _matched(train: Labelled, test: Labelled) -> Splits:
  """Both with labels among the classes of `train`."""
  if _same_place(train.name, test.name):
    raise ValueError(
      f"train and test are both {os.path.realpath(test.name)}: a probe would "
      "be tested on what it was trained on"
    )
  if train.ids is None or test.ids is None:
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    classes = max(classes, len(train.classes or ()))
    return Splits(train, test, classes)
  index = {key: i for i, key in enumerate(train.ids)}
  lost = [key for key in test.ids if key not in index]
  if lost:
    raise ValueError(
      f"{len(lost)} of {len(test.ids)} classes of {test.name} are not in "
      f"{train.name}, such as {lost[0]!r}: a probe can't learn them. Is "
      "train= another data set, or half unpacked?"
    )
  place = np.asarray([index[key] for key in test.ids], np.int32)
  test = dataclasses.replace(
    test, labels=place[test.labels], ids=train.ids, classes=train.classes
  )
  return Splits(train, test, len(train.ids))
