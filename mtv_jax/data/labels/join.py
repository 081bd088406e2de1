"""Join of label sets to the records of a source.

An entry of `data.train` names them by kind:

  dict(type="webdataset", path="shards/*.tar",
       labels=dict(depth="labels/depth", boxes="labels/boxes"))

A set made for these very shards is joined by position, which costs one read.
One made on another copy of the data, with other shards or with some records
missing, is joined by key: `boxes=dict(path="labels/boxes", join="key")`. Both
compare the key that is stored with each label.
"""

import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt64

from mtv_jax.data.labels import label_sets
from mtv_jax.data.labels.label_sets import LabelError, LabelSet
from mtv_jax.data.labels.label_values import KINDS, DepthLabel, Label, Stored
from mtv_jax.data.records import BadRecord, Record, count_dropped
from mtv_jax.data.sources.base import Source
from mtv_jax.utils.errors import InputError, did_you_mean

log = logging.getLogger(__name__)

FIELDS = {
  "depth": frozenset(["depth"]),
  "boxes": frozenset(["boxes", "phrases", "box_scores"]),
}
_JOINS = ("aligned", "key")
# Records of the base that are looked at before a run starts.
_CHECKED = 1024
_THREADS = 16


@runtime_checkable
class Labels(Protocol):
  """One label set, joined to a source."""

  kind: str

  def get(self, i: int, record: Record) -> Label | None:
    """The label of record `i`; may count in its `dropped`."""


class LabelledSource(Source):
  """A source whose records also have the fields of its label sets.

  Args:
    source: gives the records.
    labels: the sets, of different kinds.
  """

  def __init__(self, source: Source, labels: list[Labels]):
    self._source = source
    self._labels = labels
    self.name, self.files = source.name, source.files
    self.shards = source.shards
    given = (FIELDS[label.kind] for label in labels)
    self.fields = frozenset(source.fields).union(*given)

  @property
  def blocks(self) -> Int64[np.ndarray, " blocks"]:
    return self._source.blocks

  def __getitem__(self, i: SupportsIndex) -> Record:
    """Record `i` with its labels.

    Raises:
      BadRecord: the record or a label of it is damaged.
      LabelError: a label is of another record.
    """
    i = i.__index__()
    record = self._source[i]
    for labels in self._labels:
      label = labels.get(i, record)
      if isinstance(label, DepthLabel):
        record["depth"] = label.values
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
  """The source with the label sets that an entry of `data.train` names.

  Args:
    source: of any type for a join by key; tars or ArrayRecord files otherwise.
    labels: a mapping, of each kind the folder of a set, or a mapping with its
      `path`, `join` ("aligned" by default, or "key") and, for joins by key,
      `index_dir` (where its index is kept; by default in the folder).
    fields: that somebody reads; sets that give others only stay closed, and
      without any set left the source is returned as it is. None for all.

  Raises:
    InputError: an unknown kind or option.
    FileNotFoundError: a folder or a file of it is missing.
    LabelError: a set of another kind or for other records, or one whose fields
      the source gives itself.
  """
  if not isinstance(labels, Mapping) or not labels:
    raise InputError(
      f"labels={labels!r}; expected a dict of folders, such as"
      " dict(depth='labels/depth', boxes='labels/boxes')."
    )
  joined: list[Labels] = []
  for kind, entry in labels.items():
    if kind not in KINDS:
      raise InputError(f"Unknown labels {kind!r}. {did_you_mean(kind, KINDS)}")
    if fields is not None and not FIELDS[kind] & set(fields):
      continue
    if both := source.fields & FIELDS[kind]:
      raise LabelError(
        f"{source!r} gives {', '.join(sorted(both))} itself, and `labels` names"
        f" a set of {kind} too: leave out one of the two."
      )
    options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    joined.append(_open_labels(source, kind, options))
  return LabelledSource(source, joined) if joined else source


def _open_labels(source: Source, kind: str, options: dict[str, Any]) -> Labels:
  names = ("path", "join", "index_dir")
  for name in options:
    if name not in names:
      raise InputError(
        f"labels of {kind} have no option {name!r}. {did_you_mean(name, names)}"
      )
  how = options.get("join", "aligned")
  if not options.get("path"):
    raise InputError(f"labels of {kind} need a path; got {options}.")
  if how not in _JOINS:
    raise InputError(
      f"labels of {kind}: unknown join={how!r}. {did_you_mean(how, _JOINS)}"
    )
  labels = LabelSet(options["path"], kind=kind)
  if how == "key":
    return KeyedLabels(labels, source, index_dir=options.get("index_dir"))
  return AlignedLabels(labels, source)


class AlignedLabels:
  """Labels that stand where their records stand.

  Args:
    labels: the set.
    source: of tars or ArrayRecord files; all of those that the set was made
      for, or some. It may leave out records at the end of a shard, as tars do
      that also hold images without captions.

  Raises:
    LabelError: the set was made for other shards, or for fewer records.
  """

  def __init__(self, labels: LabelSet, source: Source):
    self.kind = labels.kind
    self._set = labels
    if not source.files:
      raise LabelError(
        f"{source!r} has no files that labels could be aligned with; set"
        " join='key'."
      )
    self._files = source.files
    self._starts = np.concatenate([[0], source.shards[:-1]]).astype(np.int64)
    counts = np.diff(source.shards, prepend=0)
    self._shards = self._match(counts)
    self._check_samples(source, counts)

  def _match(self, counts: np.ndarray) -> list[int]:
    """The set's shard for each of the source's."""
    place = {name: i for i, name in enumerate(self._set.names)}
    names = [label_sets.stem(file) for file in self._files]
    if missing := [name for name in names if name not in place]:
      raise LabelError(
        f"{self._set!r} has no labels for {len(missing)} of {len(names)} shards"
        f" ({', '.join(missing[:5])}); it has {', '.join(self._set.names[:5])}"
        f"{', ...' if len(place) > 5 else ''}. Make labels for them, or leave"
        " them out of the source's path."
      )
    if len(set(names)) < len(names):
      raise LabelError(
        "Two shards of the source have the same name, in different folders:"
        f" {self._set!r} can't tell them apart. Give each folder its own entry"
        " in data.train, with its own labels."
      )
    shards = [place[name] for name in names]
    for file, count, shard in zip(self._files, counts, shards, strict=True):
      if (made_for := self._set.shards[shard].records) < count:
        raise LabelError(
          f"{self._set!r} was made for {made_for} records of {file.name}, which"
          f" has {count}: make the labels of this shard again."
        )
    return shards

  def _check_samples(self, source: Source, counts: np.ndarray) -> None:
    """Compares keys and images of a few records with the manifest's."""
    samples = [
      (int(start) + at, file, key, image)
      for start, count, file, shard in zip(
        self._starts, counts, self._files, self._shards, strict=True
      )
      for at, key, image in self._set.shards[shard].samples
      if at < count
    ]
    chosen = samples[:: -(-len(samples) // _CHECKED) or 1]

    def check(sample: tuple[int, Path, str, str]) -> None:
      i, file, key, image = sample
      try:
        record = source[i]
      except BadRecord:
        return
      if record["key"] != key:
        raise LabelError(
          f"{self._set!r} was made for other shards: record {i} of {source!r},"
          f" in {file.name}, has the key {record['key']!r}, and had {key!r}."
          f" {_CURE}"
        )
      if label_sets.hash_image(record["image"]) != image:
        raise LabelError(
          f"{self._set!r} was made for other images: the bytes of"
          f" {record['key']!r} in {file} are not those that it was made for,"
          f" though the key is the same. {_CURE}"
        )

    with futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(check, chosen))

  def get(self, i: int, record: Record) -> Label | None:
    """The label of record `i`.

    Raises:
      BadRecord: the label is damaged.
      LabelError: it is of another record.
    """
    shard = int(np.searchsorted(self._starts, i, side="right")) - 1
    at = i - int(self._starts[shard])
    try:
      stored = self._set.read(self._shards[shard], at)
    except BadRecord as error:
      raise _damaged(record, error) from error
    if stored.key != record["key"]:
      raise LabelError(
        f"{self._set!r}: label {at} of {self._set.names[self._shards[shard]]}"
        f" is of the record {stored.key!r}, record {at} of"
        f" {self._files[shard]} is {record['key']!r}. {_CURE}"
      )
    return stored.label


_CURE = (
  "Make the labels again for these shards; or, if they were made on another"
  " copy of the same images, set join='key'."
)


class KeyedLabels:
  """Labels found by the key of their record.

  The keys' hashes and the labels' positions are a sorted table in a file of 16
  bytes a label, which is made once, mapped into memory and searched. Hashes
  can collide; the stored key decides.

  Args:
    labels: the set.
    source: of any type whose keys are those of the set.
    index_dir: where the table is kept; None for the set's folder.

  Raises:
    LabelError: none of the source's records has a label.
    OSError: the table can't be written.
  """

  def __init__(
    self,
    labels: LabelSet,
    source: Source,
    *,
    index_dir: str | os.PathLike | None = None,
  ):
    self.kind = labels.kind
    self._set = labels
    folder = Path(labels.folder if index_dir is None else index_dir)
    # Named by the set, so that the table of another one is never read.
    self._file = folder.expanduser() / f"keys-{labels.digest}.npy"
    counts = [shard.records for shard in labels.shards]
    self._ends = np.cumsum(counts, dtype=np.int64)
    if not self._file.exists():
      _write_table(self._file, _table(labels))
    self._map()
    self._report(source)

  def _map(self) -> None:
    self._table = np.load(self._file, mmap_mode="r", allow_pickle=False)

  def _report(self, source: Source) -> None:
    """Says how many records have a label, from a sample of them."""
    numbers = np.linspace(0, len(source) - 1, min(len(source), _CHECKED))

    def found(i: int) -> bool:
      try:
        key = source[i]["key"]
      except BadRecord:
        return True
      return self._find(key) is not None

    with futures.ThreadPoolExecutor(_THREADS) as pool:
      hits = sum(pool.map(found, numbers.astype(int).tolist()))
    if not hits and len(numbers) == len(source):
      raise LabelError(
        f"No key of {source!r} is in {self._set!r}: the source's first is"
        f" {source[0]['key']!r}, the set's {self._set.read(0, 0).key!r}."
      )
    log.log(
      logging.INFO if hits else logging.WARNING,
      "%s: %.1f %% of the records of %r have an entry, by their keys (%d of %d"
      " looked at).",
      self._set,
      100 * hits / len(numbers),
      source,
      hits,
      len(numbers),
    )

  def _find(self, key: str) -> Stored | None:
    """The label stored with this key, valid or not."""
    wanted = np.uint64(label_sets.hash_key(key))
    hashes, positions = self._table
    at = int(np.searchsorted(hashes, wanted))
    while at < len(hashes) and hashes[at] == wanted:
      position = int(positions[at])
      shard = int(np.searchsorted(self._ends, position, side="right"))
      first = int(self._ends[shard - 1]) if shard else 0
      stored = self._set.read(shard, position - first)
      if stored.key == key:
        return stored
      at += 1
    return None

  def get(self, i: int, record: Record) -> Label | None:
    """The label with the key of the record; one that is missing is counted.

    Raises:
      BadRecord: the label is damaged.
    """
    try:
      stored = self._find(record["key"])
    except BadRecord as error:
      raise _damaged(record, error) from error
    if stored is None:
      reason = f"{self.kind}: no entry with the key in the label set"
      count_dropped(record, {reason: 1})
      return None
    return stored.label

  def __getstate__(self) -> dict:
    # Pickled, a memory map is all of its bytes.
    return {k: v for k, v in vars(self).items() if k != "_table"}

  def __setstate__(self, state: dict) -> None:
    vars(self).update(state)
    self._map()


def _table(labels: LabelSet) -> UInt64[np.ndarray, "2 n"]:
  """Sorted hashes of the keys, and the positions of their labels."""
  shards = [labels.key_hashes(shard) for shard in range(len(labels.shards))]
  hashes = np.concatenate([np.zeros(0, np.uint64), *shards])
  order = np.argsort(hashes, kind="stable")
  return np.stack([hashes[order], order.astype(np.uint64)])


def _write_table(file: Path, table: np.ndarray) -> None:
  """Atomically: a reader sees the whole file or none."""
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
      prefix=f".{file.name}.", suffix=".tmp", dir=file.parent
    )
    try:
      with os.fdopen(handle, "wb") as stream:
        np.save(stream, table, allow_pickle=False)
      # mkstemp's files are for their owner only; a table is for all readers.
      os.chmod(temporary, 0o644)
      os.replace(temporary, file)
    except BaseException:
      os.unlink(temporary)
      raise
  except OSError as error:
    raise OSError(
      f"A join by key needs the table {file}, which can't be written"
      f" ({error.strerror or error}). Give these labels an index_dir that can"
      " be written."
    ) from error


def _damaged(record: Record, error: BadRecord) -> BadRecord:
  return BadRecord(record["key"], f"its label {error.key} {error.reason}")
