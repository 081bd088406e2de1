"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

Only preparing one needs TensorFlow:

  tfds build coco_captions --file_format=array_record --data_dir=DIR

Examples are parsed by `tensorflow_datasets` with NumPy alone, from ArrayRecord
or TFRecord, its default. A name with a version ("coco_captions:1.1.0") needs
only the files; without it, TFDS also imports the data set's code.
"""

import functools
import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.records import Record, content_errors, read_captions
from mtv_jax.data.sources import array_record, block_table
from mtv_jax.data.sources.shard_cache import CachedShardsSource, ShardCache
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  InputError,
  MissingFileError,
  did_you_mean,
  import_extra,
)
from mtv_jax.utils.process_cache import ProcessCache

# Paths of captions in the feature tree; the first existing one is read.
_CAPTIONS = (("captions", "text"), ("captions",), ("caption",), ("text",))


class TFDSSource(CachedShardsSource):
  """Records of one split, in TFDS order.

  The image is its encoded bytes. Captions come from the first existing feature
  of `captions/text`, `captions`, `caption` and `text`; `label` is read if it is
  a ClassLabel.

  Args:
    name: "coco_captions", with config and version as in TFDS.
    split: a split or a part of one, "train[:90%]".
    data_dir: folder of prepared data sets, which may be in a bucket; None for
      TFDS's default.

  Raises:
    MissingFileError: the data set was not prepared as ArrayRecord or TFRecord.
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
    self._data_dir = data_dir and path_lib.as_path(os.path.expanduser(data_dir))
    self._local_dir = self._copy_metadata()
    tfds = _import_tfds()
    info = self._open_builder(tfds).info
    features = dict(info.features.items())
    self._image = _find_image(tfds, features, self.name)
    self._captions = caption_path(features)
    self._is_labelled = isinstance(
      features.get("label"), tfds.features.ClassLabel
    )
    fields = ["key", "image"] + ["captions"] * bool(self._captions)
    self.fields = frozenset(fields + ["label"] * self._is_labelled)
    try:
      parts = info.splits[split].file_instructions
    except ValueError as error:
      raise InputError(f"{self.name}: {str(error).splitlines()[0]}") from None
    if not parts:
      raise InputError(f"{self.name} has no records.")
    self.shards = np.cumsum([part.take for part in parts], dtype=np.int64)
    self._skips = [part.skip for part in parts]
    counts = np.array([part.examples_in_shard for part in parts])
    files: list[PurePath] = [Path(part.filename) for part in parts]
    copies = files
    if path_lib.is_remote(self._data_dir or ""):
      names = (file.relative_to(self._local_dir) for file in files)
      files = [self._data_dir / name for name in names]
      sizes, versions = zip(*block_table.read_states(files), strict=True)
      self._cache = ShardCache(files, sizes, versions)
    is_tfrecord = info.file_format is tfds.core.FileFormat.TFRECORD
    load = _open_tfrecord if is_tfrecord else array_record.open_shard
    fix = "Copy the prepared set again."
    load = functools.partial(load, files, counts, fix=fix)
    self._open_shards(load, copies)
    # Example parsers, one per process, because they can't be pickled.
    self._parsers = ProcessCache(self._open_parser, limit=1)

  def _copy_metadata(self) -> PurePath | None:
    """Returns the local `data_dir`; copies a bucket's, without the shards."""
    if not path_lib.is_remote(self._data_dir or ""):
      return self._data_dir
    name = self._name.partition(":")[0].partition("/")[0]
    try:
      # Shards are copied one by one, see `ShardCache`.
      copy = path_lib.lazy_copy(self._data_dir / name, _is_shard, share=0.0)
    except MissingFileError as error:
      raise self._missing_error(f"{self._data_dir} has no {name!r}.") from error
    return copy.parent

  def _open_parser(self, _: int) -> Any:
    tfds = _import_tfds()
    features = self._open_builder(tfds).info.features
    # Keep every image feature encoded, even masks.
    decoders = {
      key: tfds.decode.SkipDecoding()
      for key, feature in features.items()
      if isinstance(feature, tfds.features.Image)
    }
    return functools.partial(features.deserialize_example_np, decoders=decoders)

  def _open_builder(self, tfds: Any) -> Any:
    try:
      builder = tfds.builder(self._name, data_dir=self._local_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
      folder = self._data_dir or "its default folder"
      raise self._missing_error(f"{folder} has no {self._name!r}.") from error
    except (ValueError, TypeError, AssertionError) as error:
      raise InputError(
        f"{self._name!r} is not a TFDS set: {str(error).splitlines()[0]}"
        " Expected NAME[/CONFIG][:VERSION], like cifar100 or eurosat/rgb:2.0.0."
      ) from None
    info = builder.info
    splits = info.splits
    if not splits:
      raise self._missing_error(f"{self._name} is not in {builder.data_dir}.")
    name = self._split.partition("[")[0]
    if name not in splits and "+" not in name and name != "all":
      raise InputError(
        f"{self._name} has no split {name!r}. {did_you_mean(name, splits)}"
      )
    formats = [info.file_format, *info.alternative_file_formats]
    readable = tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD
    if not (usable := [kind for kind in readable if kind in formats]):
      names = " and ".join(kind.value for kind in formats)
      raise self._missing_error(f"{self._name} is prepared as {names}.")
    info.set_file_format(usable[0], override=True, override_if_initialized=True)
    return builder

  def _missing_error(self, problem: str) -> MissingFileError:
    folder = f" --data_dir={self._data_dir}" if self._data_dir else ""
    return MissingFileError(
      f"{problem} Prepare it with `pip install 'mtv_jax[tfds]'` and `tfds build"
      f" {self._name} --file_format=array_record{folder}`."
    )

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`, keyed by its index; TFDS doesn't store keys."""
    shard, row = self._locate(i)
    key = f"{self.name}/{i.__index__():09d}"
    reader = self._readers.get(shard)
    data = array_record.read_bytes(reader, self._skips[shard] + row, where=key)
    parser = self._parsers.get(0)
    with content_errors(key, "it can't be parsed"):
      example = parser(data)
    record: Record = {"key": key, "image": example[self._image]}
    if self._captions:
      captions: Any = example
      for part in self._captions:
        captions = captions[part]
      record["captions"] = read_captions(key, captions)
    if self._is_labelled:
      record["label"] = int(example["label"])
    return record


def _find_image(tfds: Any, features: Mapping[str, Any], name: str) -> str:
  image = tfds.features.Image
  images = [key for key, kind in features.items() if isinstance(kind, image)]
  if "image" in images or len(images) == 1:
    return "image" if "image" in images else images[0]
  raise InputError(
    f"{name} must have one image feature, or one named 'image'; it has"
    f" {images or 'none'} among {sorted(features)}."
  )


def caption_path(features: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the captions' path in the feature tree, or () without captions."""
  for path in _CAPTIONS:
    node: Any = features
    for name in path:
      node = _list_children(node).get(name)
    if node is not None and not _list_children(node):
      return path
  return ()


def _list_children(node: Any) -> dict[str, Any]:
  # A Sequence of dicts has them in its attribute `feature`.
  node = getattr(node, "feature", node)
  return dict(node.items()) if hasattr(node, "items") else {}


def _import_tfds() -> Any:
  return import_extra("tensorflow_datasets", "tfds")


def _is_shard(name: str) -> bool:
  return not name.endswith((".json", ".txt"))


class _TFRecordReader:
  """Random access to the records of a local file; thread-safe.

  Raises ValueError if the file isn't a sequence of records: uint64 length, its
  checksum, data, checksum. Checksums are not verified.
  """

  def __init__(self, file: Path):
    self._file = os.open(file, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)
    self._spans: list[tuple[int, int]] = []  # Size and offset.
    offset, end = 0, os.stat(file).st_size
    while offset < end:
      header = os.pread(self._file, 8, offset)
      size = struct.unpack("<Q", header.ljust(8, b"\xff"))[0]
      self._spans.append((size, offset + 12))
      offset += size + 16
    if offset != end:
      raise ValueError(f"record {len(self) - 1} ends beyond the file")

  def __len__(self) -> int:
    return len(self._spans)

  def read(self, indices: Sequence[int]) -> list[bytes]:
    """Returns the data of records."""
    return [os.pread(self._file, *self._spans[i]) for i in indices]


def _open_tfrecord(
  files: Sequence[PurePath],
  counts: Int64[np.ndarray, " shards"],
  shard: int,
  path: Path,
  *,
  fix: str,
) -> _TFRecordReader:
  try:
    reader = _TFRecordReader(path)
    if len(reader) != counts[shard]:
      raise ValueError(f"{len(reader):,} records, expected {counts[shard]:,}")
  except ValueError as error:
    raise InputError(f"{files[shard]} is damaged ({error}). {fix}") from error
  return reader
