"""Source interface: random access to the records of a data set."""

import abc
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, ClassVar, Literal, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int64

from mtv_jax.data.records import BadRecord, Record
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.threads import map_ahead

# One or several paths: brace ranges, globs, commas; see `utils.path_patterns`.
Paths = str | os.PathLike | Sequence[str | os.PathLike]

# Captions are required, not read, or read if present.
CaptionMode = Literal["required", "ignored", "optional"]


# Records per block of an order in lanes.
LANE_BLOCK = 64


class Blocks(NamedTuple):
  """Blocks of a source, in order; they may be empty.

  A block is a run of a shard's records that one request reads, or that are read
  one by one from a local disk.
  """

  ends: Int64[np.ndarray, " blocks"]  # Cumulative record counts.
  shard: Int64[np.ndarray, " blocks"]
  # Cumulative counts that include records which the source leaves out.
  all_ends: Int64[np.ndarray, " blocks"]

  def find(self, i: int) -> int:
    """Returns the block of record `i`."""
    return int(np.searchsorted(self.ends, i, side="right"))

  def locate(self, i: int) -> tuple[int, range]:
    """Returns the shard of record `i`, and the positions of its block there.

    These include records that the source leaves out.
    """
    block = self.find(i)
    shard = int(self.shard[block])
    first = int(np.searchsorted(self.shard, shard))
    before, start = (
      int(self.all_ends[b - 1]) if b else 0 for b in (first, block)
    )
    return shard, range(start - before, int(self.all_ends[block]) - before)


def cut_blocks(
  ends: Int64[np.ndarray, " runs"], size: int
) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
  """Cuts runs of records into blocks of at most `size`.

  Runs are given by cumulative counts. Returns the blocks' cumulative counts,
  and the run of each block.
  """
  ends = np.asarray(ends, np.int64)
  starts = np.concatenate([[0], ends[:-1]])
  parts = -(-(ends - starts) // size)
  run = np.repeat(np.arange(len(ends)), parts)
  number = np.arange(len(run)) - (np.cumsum(parts) - parts)[run]
  return np.minimum(starts[run] + (number + 1) * size, ends[run]), run


class Source(abc.ABC):
  """Records by index, for the input pipeline, labelling and evaluations.

  To add a source, write a subclass in its own module and register it in
  `data.registry.SOURCES`, or name it in a config: `type="MODULE:NAME"`. Its
  constructor arguments are its options in a config, checked against their
  annotations. Sources are shared by threads and pickled to worker processes,
  without open files.
  """

  suffix: ClassVar[str] = ""  # File suffix; "" if not opened by path.
  name: str  # Short name for logs and errors.
  # Record fields (see `records`); a missing one is a missing label.
  fields: frozenset[str]
  # Cumulative record counts; the last one is the length.
  shards: Int64[np.ndarray, " shards"]
  # Shard files, to which label sets are aligned; empty if not file-based.
  files: tuple[PurePath, ...] = ()

  @property
  def blocks(self) -> Int64[np.ndarray, " blocks"]:
    """Cumulative record counts of the runs that are cheap to read together.

    A block shuffle keeps the records of a run close together.
    """
    return self.shards

  @functools.cached_property
  def lane_blocks(self) -> Blocks:
    """The blocks of an order in lanes, and of label sets."""
    ends, shard = cut_blocks(self.shards, LANE_BLOCK)
    return Blocks(ends, shard, ends)

  def use_reader(self, reader: Any) -> None:
    """Reads byte ranges of bucket files through a `RangeReader` from now on."""
    del reader

  def keep_blocks(self, count: int) -> None:
    """Keeps at least `count` blocks on disk, if the source copies blocks.

    Must be called before pickling.
    """
    del count

  def prefetch(self, first: int, count: int) -> None:
    """Starts to read `count` records from `first` on, if they are remote."""
    del first, count

  def __len__(self) -> int:
    return int(self.shards[-1])

  def _list_names(self) -> list[str]:
    """Names of the files, in the order of their records."""
    return [file.name for file in self.files]

  def describe(self) -> dict[str, Any]:
    """Returns what all hosts of a run must agree on, as JSON.

    The digest covers what determines record indices: files and counts.
    """
    names = json.dumps(self._list_names())
    ends = [np.asarray(e, "<i8").tobytes() for e in (self.shards, self.blocks)]
    data = b"".join([names.encode(), *ends])
    digest = hashlib.blake2b(data, digest_size=8).hexdigest()
    return {"name": self.name, "records": len(self), "digest": digest}

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name}, {len(self)} records)"

  @abc.abstractmethod
  def __getitem__(self, i: SupportsIndex) -> Record:
    """Returns record `i`; IndexError if it is outside [0, len).

    Raises BadRecord if it is unusable; the pipeline then reads the next one.
    """

  def read_metadata(self, i: SupportsIndex) -> Mapping[str, Any]:
    """Returns `key` and metadata of record `i`, even if it is unusable.

    Labelling reads `file_name` or `url`, `image_id`, `height` and `width`.
    """
    try:
      key = self[i]["key"]
    except BadRecord as error:
      key = error.key
    return self._metadata(i.__index__(), key)

  def read_with_metadata(self, i: SupportsIndex) -> Record:
    """Returns record `i` with its metadata in the field `meta`."""
    record = self[i]
    return record | {"meta": self._metadata(i.__index__(), record["key"])}

  def _metadata(self, i: int, key: str) -> Mapping[str, Any]:
    return {"key": key}

  def _locate(self, i: SupportsIndex) -> tuple[int, int]:
    """Returns (shard, index within the shard) of a record, or IndexError."""
    i = i.__index__()
    if not 0 <= i < len(self):
      raise IndexError(
        f"Record {i} of {self!r}: expected 0 to {len(self) - 1}."
      )
    shard = int(np.searchsorted(self.shards, i, side="right"))
    return shard, i - (int(self.shards[shard - 1]) if shard else 0)


class FileSource(Source):
  """A source of shard files with `counts` records each."""

  def __init__(
    self,
    files: Sequence[PurePath],
    counts: Sequence[int],
    *,
    captions: CaptionMode = "required",
  ):
    self.files = tuple(files)
    self.name = self.files[0].name
    if len(files) > 1:
      self.name += f"..{self.files[-1].name} ({len(files)} files)"
    self.shards = np.cumsum(counts, dtype=np.int64)
    fields = ["key", "image"] + ["captions"] * (captions != "ignored")
    self.fields = frozenset(fields)


class LimitedSource(Source):
  """`limit` evenly spaced records of a source, with their labels."""

  def __init__(self, source: Source, limit: int):
    if not 1 <= limit <= len(source):
      expected = f"expected 1 to {len(source)} records"
      raise InputError(f"{source!r}: limit={limit}, {expected}.")
    self._source, self._limit = source, limit
    self.name = f"{limit} of {source.name}"
    self.fields = source.fields
    self.shards = self._count_before(source.shards)

  def _count_before(self, ends: Int64[np.ndarray, " n"]) -> np.ndarray:
    """Number of selected records among the first `ends` of the source."""
    return -(-ends * self._limit // len(self._source))

  @property
  def blocks(self) -> Int64[np.ndarray, " blocks"]:
    return self._count_before(self._source.blocks)

  @functools.cached_property
  def lane_blocks(self) -> Blocks:
    ends, shard, all_ends = self._source.lane_blocks
    return Blocks(self._count_before(ends), shard, all_ends)

  def use_reader(self, reader: Any) -> None:
    self._source.use_reader(reader)

  def keep_blocks(self, count: int) -> None:
    self._source.keep_blocks(count)

  def prefetch(self, first: int, count: int) -> None:
    last = self._source_index(first + count - 1)
    first = self._source_index(first)
    self._source.prefetch(first, last - first + 1)

  def describe(self) -> dict[str, Any]:
    return self._source.describe() | {"limit": self._limit}

  def _source_index(self, i: SupportsIndex) -> int:
    self._locate(i)
    return i.__index__() * len(self._source) // self._limit

  def __getitem__(self, i: SupportsIndex) -> Record:
    return self._source[self._source_index(i)]

  def read_metadata(self, i: SupportsIndex) -> Mapping[str, Any]:
    return self._source.read_metadata(self._source_index(i))


def sample_captions(sources: Sequence[Source], limit: int) -> Iterator[str]:
  """Yields captions of about `limit` evenly spaced records with captions.

  Leaves out unusable records. Reads with one thread per core.
  """
  sources = [source for source in sources if "captions" in source.fields]
  share = min(1.0, limit / max(sum(map(len, sources)), 1))

  def read(source: Source, i: int) -> list[str]:
    try:
      return source[i].get("captions") or []
    except BadRecord:
      return []

  for source in sources:
    part = LimitedSource(source, max(int(share * len(source)), 1))
    read_part = functools.partial(read, part)
    yield from itertools.chain.from_iterable(
      map_ahead(read_part, range(len(part)))
    )
