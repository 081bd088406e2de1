"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

`tensorflow_datasets` reads data sets prepared as ArrayRecord with NumPy alone;
only preparing one needs TensorFlow:

  tfds build coco_captions --file_format=array_record --data_dir=DIR

A name with a version ("coco_captions:1.1.0") needs only the files; without it,
TFDS also imports the data set's code.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from mtv_jax.data.records import Record, read_captions
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  did_you_mean,
  import_extra,
)
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.process_cache import ProcessCache

# Paths of captions in the feature tree; the first existing one is read.
_CAPTIONS = (("captions", "text"), ("captions",), ("caption",), ("text",))


class TFDSSource(Source):
  """Records of one split, in TFDS order.

  The image is its encoded bytes. Captions come from the first existing feature
  of `captions/text`, `captions`, `caption` and `text`; `label` is read if it is
  a ClassLabel.

  Args:
    name: "coco_captions", with config and version as in TFDS.
    split: a split or a part of one, "train[:90%]".
    data_dir: folder of prepared data sets; None for TFDS's default.

  Raises:
    MissingFileError: the data set was not prepared as ArrayRecord.
    InputError: the split or an image feature is missing.
  """

  def __init__(
    self,
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
  ):
    self.name = f"{name}/{split}"
    self._name = name
    self._split = split
    if data_dir is not None:
      data_dir = os.path.expanduser(data_dir)
      refuse_remote(data_dir, "data_dir", "Copy the prepared set to a folder.")
    self._data_dir = data_dir
    tfds = _tfds()
    info = self._builder(tfds).info
    features = dict(info.features.items())
    self._image = _image_feature(tfds, features, self.name)
    self._captions = caption_path(features)
    self._label = isinstance(features.get("label"), tfds.features.ClassLabel)
    fields = ["key", "image"] + ["captions"] * bool(self._captions)
    self.fields = frozenset(fields + ["label"] * self._label)
    parts = info.splits[split].file_instructions
    self.shards = np.cumsum([part.take for part in parts], dtype=np.int64)
    # Cached per process: readers have threads, which a fork doesn't copy.
    self._opened = ProcessCache(self._open, limit=1)
    self._opened.get(0)

  def _open(self, _: int) -> Sequence[Mapping[str, Any]]:
    tfds = _tfds()
    builder = self._builder(tfds)
    try:
      return builder.as_data_source(
        split=self._split,
        # Every image feature, masks included.
        decoders={
          key: tfds.decode.SkipDecoding()
          for key, feature in builder.info.features.items()
          if isinstance(feature, tfds.features.Image)
        },
      )
    except NotImplementedError as error:
      where = f"{self._name} is prepared in {builder.data_dir}"
      problem = f"{where}, but not in a format that allows random access."
      raise self._missing(problem) from error

  def _builder(self, tfds: Any) -> Any:
    try:
      builder = tfds.builder(self._name, data_dir=self._data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
      folder = self._data_dir or "its default folder"
      raise self._missing(f"{folder} has no {self._name!r}.") from error
    splits = builder.info.splits
    if not splits:
      raise self._missing(f"{self._name} is not in {builder.data_dir}.")
    base = self._split.partition("[")[0]
    if base not in splits and "+" not in base and base != "all":
      raise InputError(
        f"{self._name} has no split {base!r}. {did_you_mean(base, splits)}"
      )
    return builder

  def _missing(self, problem: str) -> MissingFileError:
    folder = f" --data_dir={self._data_dir}" if self._data_dir else ""
    return MissingFileError(
      f"{problem} Prepare it with `pip install 'mtv_jax[tfds]'` and `tfds build"
      f" {self._name} --file_format=array_record{folder}`."
    )

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`, keyed by its index; TFDS doesn't store keys."""
    i = i.__index__()
    self._locate(i)
    example = self._opened.get(0)[i]
    key = f"{self.name}/{i:09d}"
    record: Record = {"key": key, "image": example[self._image]}
    if self._captions:
      captions: Any = example
      for part in self._captions:
        captions = captions[part]
      record["captions"] = read_captions(key, captions)
    if self._label:
      record["label"] = int(example["label"])
    return record


def _image_feature(tfds: Any, features: Mapping[str, Any], name: str) -> str:
  image = tfds.features.Image
  images = [key for key, kind in features.items() if isinstance(kind, image)]
  if "image" in images or len(images) == 1:
    return "image" if "image" in images else images[0]
  raise InputError(
    f"{name} must have one image feature, or one named 'image'; it has"
    f" {images or 'none'} among {sorted(features)}."
  )


def caption_path(features: Mapping[str, Any]) -> tuple[str, ...]:
  """Path to the captions in the feature tree; () if it has none."""
  for path in _CAPTIONS:
    node: Any = features
    for name in path:
      node = _children(node).get(name)
    if node is not None and not _children(node):
      return path
  return ()


def _children(node: Any) -> dict[str, Any]:
  # A Sequence of dicts has them in its attribute `feature`.
  node = getattr(node, "feature", node)
  return dict(node.items()) if hasattr(node, "items") else {}


def _tfds() -> Any:
  return import_extra("tensorflow_datasets", "tfds")
