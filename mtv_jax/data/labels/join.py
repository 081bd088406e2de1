"""Join of label sets to the records of a source.

An entry of `data.train` lists label sets by kind:

  dict(type="webdataset", path="shards/*.tar",
       labels=dict(depth="labels/depth", boxes="labels/boxes"))

Features are listed by teacher, `features=dict(dino="labels/dino")`.

A label set of these shards is joined by position, with one read. A label set of
a different copy of the data, with different shards or missing records, is
joined by key: `boxes=dict(path="labels/boxes", join="key")`. Both verify the
key that is stored with each label.
"""

import abc
import functools
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, SupportsIndex

import numpy as np
from jaxtyping import Int64, UInt64

from mtv_jax.config import options as options_lib
from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import (
  DepthLabel,
  FeatureLabel,
  Label,
  StoredLabel,
)
from mtv_jax.data.records import (
  LABEL_FIELDS,
  BadRecord,
  Record,
  count_dropped,
)
from mtv_jax.data.sources.base import Blocks, LimitedSource, Source
from mtv_jax.utils import atomic
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  StorageError,
  check_choice,
)
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import RangeReader
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import map_threads

log = logging.getLogger(__name__)

JOINS = ("aligned", "key")
_REMOVE = "Remove this file; it is written again from the label set."
# Maximum number of base records checked before a run starts.
_MAX_CHECKED = 1024
_MAX_HASHED = 64  # Shards whose key hashes are in memory, 8 bytes per record.


class JoinedLabels(abc.ABC):
  """A label set joined to a source."""

  teacher: str | None = None  # For features.

  def __init__(self, label_set: LabelSet):
    self.kind = label_set.kind
    self.label_set = label_set

  @abc.abstractmethod
  def get(self, i: int, record: Record) -> Label | None:
    """Returns a label; BadRecord if corrupt, LabelError if it doesn't match."""

  def use_reader(self, reader: RangeReader) -> None:
    if self.label_set.blocks:
      self.label_set.blocks.use(reader)

  def prefetch(self, first: int, count: int) -> None:
    del first, count


class LabelledSource(Source):
  """A source whose records include the fields of joined label sets."""

  def __init__(self, source: Source, labels: list[JoinedLabels]):
    self._source = source
    self._labels = labels
    self.name, self.files = source.name, source.files
    self.shards = source.shards
    label_fields = (LABEL_FIELDS[label.kind] for label in labels)
    self.fields = frozenset(source.fields).union(*label_fields)

  @property
  def blocks(self) -> Int64[np.ndarray, " blocks"]:
    return self._source.blocks

  @property
  def lane_blocks(self) -> Blocks:
    return self._source.lane_blocks

  def use_reader(self, reader: RangeReader) -> None:
    for part in (self._source, *self._labels):
      part.use_reader(reader)

  def keep_blocks(self, count: int) -> None:
    self._source.keep_blocks(count)

  def prefetch(self, first: int, count: int) -> None:
    for part in (self._source, *self._labels):
      part.prefetch(first, count)

  def describe(self) -> dict[str, Any]:
    """As in the base class, with the digest of each label set."""
    labels = {
      ".".join(filter(None, [label.kind, label.teacher])): label.label_set
      for label in self._labels
    }
    digests = {name: label_set.digest for name, label_set in labels.items()}
    return self._source.describe() | {"labels": digests}

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i` with its labels."""
    i = i.__index__()
    record = self._source[i]
    for labels in self._labels:
      try:
        label = labels.get(i, record)
      except BadRecord as error:
        reason = f"its label {error.key} {error.reason}"
        raise BadRecord(record["key"], reason) from error
      if isinstance(label, DepthLabel):
        record["depth"] = label.values
      elif isinstance(label, FeatureLabel):
        record.setdefault("features", {})[labels.teacher] = label
      elif label is not None:
        record["boxes"] = label.boxes
        record["phrases"] = list(label.phrases)
        record["box_scores"] = label.scores
    return record

  def __repr__(self) -> str:
    kinds = ", ".join(label.kind for label in self._labels)
    return f"{self._source!r} with {kinds}"


def join_labels(
  source: Source, labels: Any, *, fields: Collection[str] | None = None
) -> Source:
  """Joins the label sets that an entry of `data.train` lists to its source.

  `labels` maps each kind to a folder or to options of `open_labels`, for
  features by teacher. Label sets without any of `fields` (None: all) are not
  opened; if all are left out, returns the source unchanged.

  Raises LabelError if a label set has the wrong kind, is for different records,
  or adds fields that the source already has.
  """
  if not isinstance(labels, Mapping) or not labels:
    expected = "expected a dict of folders, such as dict(depth='labels/depth')"
    raise ConfigError(f"labels={labels!r}; {expected}.")
  joined: list[JoinedLabels] = []
  for kind, entry in labels.items():
    check_choice("The kind of labels", kind, LABEL_FIELDS)
    if fields is not None and not LABEL_FIELDS[kind] & set(fields):
      continue
    if shared := source.fields & LABEL_FIELDS[kind]:
      names = ", ".join(sorted(shared))
      raise LabelError(f"{source!r} has {names} already: remove labels.{kind}.")
    if kind != "features":
      joined.append(_open_entry(source, kind, entry, f"labels.{kind}"))
      continue
    if not isinstance(entry, Mapping):
      expected = (
        "a dict of folders by teacher, such as dict(dino='labels/dino')"
      )
      raise ConfigError(f"labels.features={entry!r}; expected {expected}.")
    for teacher, teacher_entry in entry.items():
      where = f"labels.features.{teacher}"
      joined.append(_open_entry(source, kind, teacher_entry, where))
      joined[-1].teacher = teacher
  return LabelledSource(source, joined) if joined else source


def _open_entry(
  source: Source, kind: str, entry: Any, where: str
) -> JoinedLabels:
  options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
  build = functools.partial(open_labels, source, kind)
  return options_lib.build(build, options, where=where)


def open_labels(
  source: Source,
  kind: str,
  *,
  path: str | os.PathLike,
  join: Literal["aligned", "key"] = "aligned",
  index_dir: str | os.PathLike | None = None,
) -> JoinedLabels:
  """Opens the label set in `path`; `index_dir` is for the index of keys."""
  labels = LabelSet(path, kind=kind)
  if join == "aligned":
    return AlignedLabels(labels, source)
  return KeyedLabels(labels, source, index_dir=index_dir)


class ControlSource(LimitedSource):
  """A source with changed labels, for control runs of a study.

  The fields in `shuffled` come from a different record, the next in a fixed
  random cycle over all records, so that no record keeps its own labels. With
  `whole_image_boxes`, every box is the whole image: phrases without positions.
  With `phrases_as_captions`, the phrases of the boxes follow the captions.
  """

  def __init__(
    self,
    source: Source,
    shuffled: Collection[str],
    whole_image_boxes: bool,
    phrases_as_captions: bool,
  ):
    super().__init__(source, len(source))
    self._shuffled = frozenset(shuffled)
    self._whole_image_boxes = whole_image_boxes
    self._phrases_as_captions = phrases_as_captions
    if phrases_as_captions:
      self.fields |= {"captions"}
    if shuffled and len(source) < 2:
      raise InputError(
        f"{source!r} has one record, whose labels can't be shuffled:"
        " shuffled_labels needs at least two records."
      )
    self.name = source.name

  @functools.cached_property
  def _label_records(self) -> Int64[np.ndarray, " n"]:
    """For each record, the record whose labels it gets."""
    cycle = np.random.default_rng(0).permutation(len(self))
    label_records = np.empty_like(cycle)
    label_records[cycle] = np.roll(cycle, 1)
    return label_records

  def describe(self) -> dict[str, Any]:
    controls = {
      "shuffled": sorted(self._shuffled),
      "whole_image_boxes": self._whole_image_boxes,
    }
    if self._phrases_as_captions:
      controls["phrases_as_captions"] = True
    return self._source.describe() | controls

  def __getitem__(self, i: SupportsIndex) -> Record:
    record = super().__getitem__(i)
    if self._shuffled:
      other = super().__getitem__(self._label_records[i])
      for field in self._shuffled:
        record.pop(field, None)
        if field in other:
          record[field] = other[field]
    if self._whole_image_boxes and "boxes" in record:
      image_box = np.array([0, 0, 1, 1], np.float32)
      record["boxes"] = np.broadcast_to(image_box, np.shape(record["boxes"]))
    if self._phrases_as_captions:
      captions = record.get("captions") or []
      record["captions"] = [*captions, *(record.get("phrases") or [])]
    return record


class AlignedLabels(JoinedLabels):
  """Labels joined by position in the shards.

  The source may have a subset of the label set's shards, and may drop records
  of a shard, as tars do with images without captions. A tar's index puts these
  records last; a table of blocks keeps the tar's order. A label that is not at
  its record's position is found by the hashes of the shard's keys.
  """

  def __init__(self, labels: LabelSet, source: Source):
    super().__init__(labels)
    if not source.files:
      raise LabelError(
        f"{source!r} has no files to align with; set join='key'."
      )
    self._files = source.files
    self._starts = np.concatenate([[0], source.shards[:-1]]).astype(np.int64)
    counts = np.diff(source.shards, prepend=0)
    self._shards = self._match_shards(counts)
    self._source = source
    self._hashes = ProcessCache(labels.key_hashes, limit=_MAX_HASHED)
    # Records in a bucket are checked when they are read.
    self._is_remote = labels.blocks and path_lib.is_remote(self._files[0])
    if not self._is_remote:
      self._check_samples(source, counts)

  def _match_shards(self, counts: np.ndarray) -> list[int]:
    """Returns the label set's shard for each shard of the source."""
    index = {name: i for i, name in enumerate(self.label_set.names)}
    names = [label_sets.shard_name(file) for file in self._files]
    if missing := [name for name in names if name not in index]:
      raise LabelError(
        f"{self.label_set!r} has no labels for {len(missing)} of {len(names)}"
        f" shards ({list_first(missing, 5)}); it has"
        f" {list_first(list(index), 5)}. Label them, or leave them out."
      )
    if len(set(names)) < len(names):
      raise LabelError(
        "Two shards of the source share a name. Give each folder an entry in"
        " data.train with its labels."
      )
    shards = [index[name] for name in names]
    for file, count, shard in zip(self._files, counts, shards, strict=True):
      if (labelled := self.label_set.counts[shard]) < count:
        raise LabelError(
          f"{self.label_set!r} has labels of {labelled} records of {file.name},"
          f" which has {count}: label it again."
        )
    return shards

  def _check_samples(self, source: Source, counts: np.ndarray) -> None:
    """Compares keys and images of a few records with the manifest."""
    shards = self.label_set.manifest["shards"]
    samples = [
      (int(start) + index, file, key, image)
      for start, count, file, shard in zip(
        self._starts, counts, self._files, self._shards, strict=True
      )
      for index, key, image in shards[shard]["samples"]
      if index < count
    ]
    checked = samples[:: -(-len(samples) // _MAX_CHECKED) or 1]

    def check(sample: tuple[int, PurePath, str, str]) -> None:
      i, file, key, image = sample
      new_key, new_image = label_sets.read_sample(source, i) or (key, image)
      if new_key != key:
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        if all(self._find_by_key(shard, k) for k in (key, new_key)):
          return  # Both exist, in a different order.
        raise LabelError(
          f"{self.label_set!r} belongs to other shards: record {i} of"
          f" {source!r}, in {file.name}, has key {new_key!r}, expected"
          f" {key!r}. {_ADVICE}"
        )
      if new_image != image:
        raise self._other_images_error(key, file)

    map_threads(check, checked)

  def _other_images_error(self, key: str, file: PurePath) -> LabelError:
    return LabelError(
      f"{self.label_set!r} belongs to other images: {key!r} in {file} has the"
      f" same key but other bytes. {_ADVICE}"
    )

  def prefetch(self, first: int, count: int) -> None:
    blocks = self.label_set.blocks
    if blocks and path_lib.is_remote(self.label_set.folder):
      shard, begin = self._source.lane_blocks.locate(first)
      _, end = self._source.lane_blocks.locate(first + count - 1)
      blocks.prefetch(self._shards[shard], range(begin.start, end.stop))

  def _find_by_key(self, shard: int, key: str) -> StoredLabel | None:
    """Searches a whole shard for a record's label, by key."""
    target = np.uint64(label_sets.hash_key(key))
    hashes = self._hashes.get(self._shards[shard])
    for index in np.flatnonzero(hashes == target):
      stored = self.label_set.read(self._shards[shard], int(index))
      if stored.key == key:
        return stored
    return None

  def _find(self, i: int, record: Record) -> Label | None:
    """Returns the label of record `i` from its block."""
    blocks = self._source.lane_blocks
    shard, positions = blocks.locate(i)
    if blocks.ends[-1] == blocks.all_ends[-1]:  # No record is left out.
      index = i - int(self._starts[shard])
      positions = range(index, index + 1)
    key, labels, file = record["key"], self.label_set, self._files[shard]
    stored = labels.find(self._shards[shard], positions, key)
    stored = stored or self._find_by_key(shard, key)
    if stored is None:
      problem = f"it has no label of record {key!r} of {file.name}"
      raise LabelError(f"{labels!r} is for other shards: {problem}. {_ADVICE}")
    self._check_image(shard, record)
    return stored.label

  def _check_image(self, shard: int, record: Record) -> None:
    """Compares a record's image with the manifest, if it is listed there."""
    labels, key, data = self.label_set, record["key"], record.get("image")
    samples = labels.manifest["shards"][self._shards[shard]]["samples"]
    for _, sample, image in samples:
      if sample == key and data and image != label_sets.hash_bytes(data):
        raise self._other_images_error(key, self._files[shard])

  def get(self, i: int, record: Record) -> Label | None:
    if self._is_remote:
      return self._find(i, record)
    shard = int(np.searchsorted(self._starts, i, side="right")) - 1
    index = i - int(self._starts[shard])
    stored = self.label_set.read(self._shards[shard], index)
    if stored.key != (key := record["key"]):
      if match := self._find_by_key(shard, key):
        self._check_image(shard, record)
        return match.label
      file = self._files[shard]
      name = label_sets.shard_name(file)
      raise LabelError(
        f"{self.label_set!r}: label {index} of {name} is for the record"
        f" {stored.key!r}, but record {index} of {file} is {key!r}. {_ADVICE}"
      )
    return stored.label


_ADVICE = "Label them again; for another copy of the images set join='key'."


class KeyedLabels(JoinedLabels):
  """Labels joined by key.

  The index is a sorted table of key hashes and label positions, 16 bytes per
  label, in a memory-mapped file that is written once. Hashes may collide, so
  the stored key decides.

  Raises LabelError if no record has a label, StorageError if the table can't be
  written.
  """

  def __init__(
    self,
    labels: LabelSet,
    source: Source,
    *,
    index_dir: str | os.PathLike | None = None,
  ):
    super().__init__(labels)
    if index_dir is not None:
      refuse_remote(index_dir, "index_dir", "Pass a folder of this machine.")
      folder = Path(index_dir)
    elif path_lib.is_remote(labels.folder):
      folder = path_lib.cache_folder()
    else:
      folder = Path(labels.folder)
    # The digest distinguishes the tables of different label sets.
    self._file = folder.expanduser() / f"keys-{labels.digest}.npy"
    self._ends = np.cumsum(labels.counts, dtype=np.int64)
    if not self._file.is_file():
      _write_table(self._file, labels)
    self._log_coverage(source)

  @functools.cached_property
  def _table(self) -> np.ndarray:
    shape = 2, len(self.label_set)
    return label_sets.load_array(self._file, shape, fix=_REMOVE)

  def __getstate__(self) -> dict[str, Any]:
    # Pickling a memory map would copy all of its bytes.
    return {k: v for k, v in vars(self).items() if k != "_table"}

  def _log_coverage(self, source: Source) -> None:
    """Logs the share of records with a label, estimated from a sample."""
    numbers = np.linspace(0, len(source) - 1, min(len(source), _MAX_CHECKED))

    def has_label(i: int) -> bool:
      try:
        key = source[i]["key"]
      except BadRecord:
        return True
      return self._find(key) is not None

    hits = sum(map_threads(has_label, numbers.astype(int).tolist()))
    if not hits and len(numbers) == len(source):
      raise LabelError(
        f"No key of {source!r} is in {self.label_set!r}: the first keys are"
        f" {source[0]['key']!r} and {self.label_set.read(0, 0).key!r}."
      )
    log.log(
      logging.INFO if hits else logging.WARNING,
      f"{self.label_set}: {100 * hits / len(numbers):.1f} % of the records of"
      f" {source!r} have an entry ({hits} of {len(numbers)} checked).",
    )

  def _find(self, key: str) -> StoredLabel | None:
    """Returns the entry of a key, with or without a label."""
    target = np.uint64(label_sets.hash_key(key))
    hashes, positions = self._table
    row = int(np.searchsorted(hashes, target))
    while row < len(hashes) and hashes[row] == target:
      position = int(positions[row])
      if position >= len(self.label_set):
        raise LabelError(f"{self._file} is damaged. {_REMOVE}")
      shard = int(np.searchsorted(self._ends, position, side="right"))
      start = int(self._ends[shard]) - self.label_set.counts[shard]
      stored = self.label_set.read(shard, position - start)
      if stored.key == key:
        return stored
      row += 1
    return None

  def get(self, i: int, record: Record) -> Label | None:
    stored = self._find(record["key"])
    if stored is None:
      reason = f"{self.kind}: no entry with the key in the label set"
      count_dropped(record, {reason: 1})
      return None
    return stored.label


def _write_table(file: Path, labels: LabelSet) -> None:
  shards = [labels.key_hashes(shard) for shard in range(len(labels.names))]
  hashes = np.concatenate([np.zeros(0, np.uint64), *shards])
  order = np.argsort(hashes, kind="stable")
  table: UInt64[np.ndarray, "2 n"] = np.stack(
    [hashes[order], order.astype("u8")]
  )
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.remove_abandoned(file.parent, name="keys-")
    with atomic.replace_file(file) as temporary, temporary.open("wb") as stream:
      np.save(stream, table, allow_pickle=False)
  except OSError as error:
    problem = f"the table {file} can't be written ({error.strerror or error})"
    fix = "Set index_dir to a writable folder."
    raise StorageError(f"For a join by key, {problem}. {fix}") from error
