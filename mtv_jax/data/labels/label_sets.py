"""Label sets: folders of labels for the records of shards.

  settings.json         kind, settings, record counts of the base shards
  manifest.json         settings and statistics; written last
  00000.blocks          a label for every record of base shard 00000, in order
  blocks.npz            table of the blocks of these files
  00000.keys.npy        uint64 hash of each record's key, for joins by key
  00000_stats.json      the manifest's entry of this shard

Label i of a file is for record i of its base shard; a record without a label
has an entry marked invalid. Every label stores its record's key. The manifest
stores a few keys and image hashes of the base. Sets of version 1 have
`00000.array_record` instead of the blocks, and are read from a local disk.
"""

import collections
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import UInt64

from mtv_jax.config.overrides import describe_difference
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import BoxLabel, LabelOutcome, StoredLabel
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import array_record, block_table
from mtv_jax.data.sources.base import Source
from mtv_jax.data.sources.block_table import BlockTable
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, MissingFileError, printable
from mtv_jax.utils.process_cache import ProcessCache
from mtv_jax.utils.ranges import RangeReader
from mtv_jax.utils.text import first_lines, list_first
from mtv_jax.utils.threads import map_threads

VERSION = 2
MANIFEST, SETTINGS = "manifest.json", "settings.json"
_SUFFIXES = (".tar", ".array_record", ".parquet")
_MAX_LINES = 12  # Differences listed in an error.
_MEMORY = 1 << 28  # Bytes for a bucket's blocks, outside of training.
# Parsed JSON takes up to twenty times its bytes; 100,000 shards take 30 MB.
_MAX_MANIFEST = 1 << 25


class LabelError(InputError):
  """Raised for a label set that is unusable or doesn't fit the shards."""


def shard_name(file: PurePath) -> str:
  """Name shared by a base shard and its labels, such as "00000"."""
  return file.stem if file.suffix in _SUFFIXES else file.name


def hash_key(key: str) -> int:
  """64-bit hash of a record's key."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def hash_bytes(data: bytes) -> str:
  """64-bit hash of bytes, such as an image file, as hexadecimal."""
  return hashlib.blake2b(data, digest_size=8).hexdigest()


def read_sample(source: Source, i: int) -> tuple[str, str] | None:
  """Returns key and image hash of record `i`; None if it is unusable."""
  try:
    record = source[i]
  except BadRecord:
    return None
  return record["key"], hash_bytes(record["image"])


@dataclasses.dataclass
class LabelCounts:
  """Counts of records, labels and boxes in a label set or shard."""

  records: int = 0
  labelled: int = 0
  boxes: int = 0
  # Reasons for missing or changed labels.
  reasons: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def add(self, outcome: LabelOutcome) -> None:
    """Adds one record."""
    self.records += 1
    self.labelled += outcome.label is not None
    if isinstance(outcome.label, BoxLabel):
      self.boxes += len(outcome.label.boxes)
    self.reasons.update(outcome.counts)

  def merge(self, counts: Mapping[str, Any]) -> None:
    """Adds the counts of `to_dict`."""
    self.records += counts["records"]
    self.labelled += counts["labelled"]
    self.boxes += counts["boxes"]
    self.reasons.update(counts["reasons"])

  def to_dict(self) -> dict[str, Any]:
    """Returns a JSON object; reasons by descending count, then by name."""
    order = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
    return dataclasses.asdict(self) | {"reasons": dict(order)}

  def format_summary(self, kind: str, out: str | os.PathLike) -> str:
    """Formats the counts and reasons as text."""
    boxes = f" with {self.boxes:,} boxes" if kind == "boxes" else ""
    count = f"{self.labelled:,} of {self.records:,} records"
    lines = [f"{count} have a label{boxes}, in {out}."]
    reasons = self.to_dict()["reasons"].items()
    lines += [f"  {n:,} times: {reason}" for reason, n in reasons]
    return "\n".join(lines)


class LabelSet:
  """Labels in a folder, by shard and index.

  From a bucket, blocks are read by ranges; sets of version 1 are copied whole.

  `names` and `counts` are shard names and record counts; `digest`, a hash of
  the manifest, identifies the label set.

  Raises LabelError if the kind or version differs, or if files contradict the
  manifest; MissingFileError if one is missing.
  """

  def __init__(self, folder: str | os.PathLike, *, kind: str):
    self.folder = path_lib.as_path(folder)
    if not path_lib.is_remote(folder):
      self.folder = self.folder.expanduser()
    self.kind = kind
    self.manifest, self.digest = _load_manifest(self.folder, kind)
    shards = self.manifest["shards"]
    self.names = [shard_name(Path(shard["base"])) for shard in shards]
    self.counts = [shard["records"] for shard in shards]
    self.blocks: LabelBlocks | None = None
    if self.manifest["version"] == VERSION:
      file = self.folder / block_table.NAME
      fix = "Copy the label set again, or write it again."
      files = [self.folder / f"{n}{SUFFIX}" for n in self.names]
      table = block_table.read(file, fix=fix).select(files, fix=fix)
      if table.count_records() != self.counts:
        raise LabelError(
          f"The table of blocks in {self.folder} doesn't fit its {MANIFEST}:"
          " they belong to different sets. Copy or write the set again."
        )
      self.blocks = LabelBlocks(table, RangeReader(_MEMORY))
      return
    # ArrayRecord readers need local files.
    self.folder = path_lib.local_copy(folder).expanduser()
    self._files = [self.folder / f"{name}.array_record" for name in self.names]
    self._check_files()
    # Two label sets and their source share the process's open-file limit.
    self._readers = array_record.open_readers(self._files, descriptors=2)

  def _check_files(self) -> None:
    files = self._files
    if missing := [file.name for file in files if not file.is_file()]:
      raise MissingFileError(
        f"{len(missing)} of {len(files)} files of the label set {self.folder}"
        f" are missing: {list_first(missing, 8)}. Copy or write them again."
      )
    counts = map_threads(array_record.count_records, files)
    for file, count, expected in zip(files, counts, self.counts, strict=True):
      if count != expected:
        raise LabelError(
          f"{file} has {count} labels, but {MANIFEST} lists {expected}: they"
          " belong to different sets. Write the set again."
        )

  def __len__(self) -> int:
    return sum(self.counts)

  def read(self, shard: int, index: int) -> StoredLabel:
    """Reads a shard's label by index; raises BadRecord if it is corrupt."""
    where = f"{self.folder.name}/{self.names[shard]}:{index}"
    if self.blocks:
      data = self.blocks.read(shard, index)
    else:
      reader = self._readers.get(shard)
      data = array_record.read_bytes(reader, index, where=where)
    return label_values.decode(data, kind=self.kind, where=where)

  def find(self, shard: int, positions: range, key: str) -> StoredLabel | None:
    """Searches a shard's blocks at these positions for a record's label."""
    where = f"{self.folder.name}/{self.names[shard]}:{key}"
    for data in self.blocks.find(shard, positions, hash_key(key)):
      stored = label_values.decode(data, kind=self.kind, where=where)
      if stored.key == key:
        return stored
    return None

  def key_hashes(self, shard: int) -> UInt64[np.ndarray, " n"]:
    """Returns `hash_key` of each record of a shard."""
    file = self.folder / f"{self.names[shard]}.keys.npy"
    if not path_lib.is_file(file):
      raise MissingFileError(
        f"The label set {self.folder} has no {file.name}, which a join by key"
        " needs. Copy it, or write the set again."
      )
    file = path_lib.local_copy(file)
    return np.array(load_array(file, (self.counts[shard],)))

  def __repr__(self) -> str:
    return f"LabelSet({self.kind}, {self.folder}, {len(self)} records)"


def load_array(
  file: Path, shape: tuple[int, ...], *, fix: str = "Write the set again."
) -> UInt64[np.ndarray, "..."]:
  """Memory-maps a .npy file of unsigned 64-bit integers of a shape."""
  try:
    # Unlike a read, a map doesn't allocate memory if the header is wrong.
    array = np.load(file, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError, OverflowError, SyntaxError) as error:
    raise LabelError(
      f"{file} is not a .npy file, or damaged ({printable(error)}). {fix}"
    ) from error
  if (array.shape, array.dtype) != (shape, np.uint64):
    raise LabelError(
      f"{file} has shape {array.shape}, expected {shape}, and {array.dtype},"
      f" expected uint64: it belongs to another label set. {fix}"
    )
  return array


def _load_manifest(
  folder: PurePath, kind: str
) -> tuple[Mapping[str, Any], str]:
  file = folder / MANIFEST
  try:
    path_lib.check_regular_file(file)
    data = path_lib.read_range(file, 0, _MAX_MANIFEST + 1)
  except (FileNotFoundError, NotADirectoryError) as error:
    problem = f"There is no folder of labels {folder}."
    if path_lib.is_folder(folder):
      problem = (
        f"{folder} has no {MANIFEST}: it is not a label set, or is unfinished."
        " Rerun the command that writes it to resume."
      )
    raise MissingFileError(problem) from error
  if len(data) > _MAX_MANIFEST:
    raise LabelError(
      f"{file} has more than {_MAX_MANIFEST:,} bytes, too many for a manifest."
      " Copy it again."
    )
  try:
    manifest = json.loads(data)
    version, stored_kind = manifest["version"], manifest["kind"]
    _check_shards(manifest["shards"])
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise LabelError(
      f"{file} is not a manifest of a label set ({printable(repr(error))})."
      " Copy it again, or write the labels again."
    ) from error
  if type(version) is not int or not 1 <= version <= VERSION:
    raise LabelError(
      f"{file} has version {printable(version)}, but this code reads 1 to"
      f" {VERSION}: write the labels again."
    )
  if stored_kind != kind:
    stored_kind = printable(stored_kind)
    raise LabelError(
      f"{folder} contains labels of kind {stored_kind!r}, not {kind!r}. Write"
      f" labels=dict({stored_kind}={str(folder)!r})."
    )
  return manifest, hash_bytes(data)


def _check_shards(shards: Any) -> None:
  if not isinstance(shards, list):
    raise ValueError(f"'shards' is a {type(shards).__name__}, not a list")
  if not shards:
    raise ValueError("it lists no shard")
  names = set()
  for shard in shards:
    base, records = shard["base"], shard["records"]
    if not isinstance(base, str) or type(records) is not int or records < 0:
      raise ValueError(f"a shard has base={base!r}, records={records!r}")
    if "/" in base or "\0" in base or shard_name(Path(base)) in names:
      raise ValueError(f"the shard {base!r} is listed twice, or is a path")
    names.add(shard_name(Path(base)))
    for index, key, image in shard["samples"]:
      types = type(index), type(key), type(image)
      if types != (int, str, str) or index < 0:
        raise ValueError(f"a sample of {base!r} is {[index, key, image]!r}")


def describe_settings(
  kind: str, settings: Mapping[str, Any], base: Source, version: int = VERSION
) -> dict[str, Any]:
  """Content of `settings.json`; TypeError if it can't be JSON."""
  counts = np.diff(base.shards, prepend=0).tolist()
  described = {
    "version": version,
    "kind": kind,
    "settings": dict(settings),
    "base": {f.name: n for f, n in zip(base.files, counts, strict=True)},
  }
  # Round trip, because JSON turns tuples into lists.
  return json.loads(json.dumps(described))


def write_or_check_settings(
  out: PurePath, described: Mapping[str, Any]
) -> None:
  """Writes `settings.json`, or raises FileExistsError if it differs."""
  if path_lib.exists(out / MANIFEST):
    check_manifest(out, described)
  file = out / SETTINGS
  data = path_lib.write_if_absent(file, to_json(described))
  _require_equal(_parse_json(data, file), described, f"{out} has an unfinished")


def check_manifest(out: PurePath, described: Mapping[str, Any]) -> None:
  """Raises FileExistsError if a finished set differs from `described`."""
  file = out / MANIFEST
  manifest = _parse_json(path_lib.read_bytes(file), file)
  shards = manifest.get("shards", [])
  manifest["base"] = {shard["base"]: shard["records"] for shard in shards}
  stored = {key: manifest.get(key) for key in described}
  _require_equal(stored, described, f"{out} has a finished")


def to_json(content: Any) -> bytes:
  """Formats JSON as in all label set files."""
  return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _parse_json(data: bytes, file: PurePath) -> dict[str, Any]:
  try:
    content = json.loads(data)
    if not isinstance(content, dict):
      raise ValueError(f"a {type(content).__name__}")
  except ValueError as error:
    fix = "Remove the folder, or choose another one."
    raise FileExistsError(f"{file} can't be read ({error}). {fix}") from error
  return content


def _require_equal(
  stored: Mapping[str, Any], requested: Mapping[str, Any], prefix: str
) -> None:
  if changed := describe_difference(stored, requested):
    raise FileExistsError(
      f"{prefix} label set with other settings (stored -> requested):\n"
      f"{first_lines(changed, _MAX_LINES)}\n"
      "Choose another folder, or remove this one to label again."
    )


SUFFIX = ".blocks"
_HEADER = np.dtype([("count", "<u4"), ("crc", "<u4")])
_ENTRY = np.dtype([("key", "<u8"), ("end", "<u4"), ("crc", "<u4")])


def pack(pairs: Sequence[tuple[int, bytes]]) -> bytes:
  """Returns a block of (key hash, label) pairs."""
  entries = np.zeros(len(pairs), _ENTRY)
  entries["key"] = [key for key, _ in pairs]
  labels = [label for _, label in pairs]
  entries["end"] = np.cumsum([len(label) for label in labels], dtype=np.int64)
  entries["crc"] = [zlib.crc32(label) for label in labels]
  directory = entries.tobytes()
  header = np.array((len(pairs), zlib.crc32(directory)), _HEADER)
  return b"".join([header.tobytes(), directory, *labels])


class LabelBlocks:
  """A set's labels by block; bucket files are read by ranges."""

  def __init__(self, table: BlockTable, reader: RangeReader):
    self.table = table
    self._reader = reader
    self._ends = np.cumsum(table.records)
    # First label of each shard.
    self._starts = np.cumsum([0, *table.count_records()])
    self._maps = ProcessCache(self._map_file)

  def use(self, reader: RangeReader) -> None:
    """Reads through another reader from now on."""
    self._reader = reader

  def _map_file(self, shard: int) -> np.ndarray:
    return np.memmap(self.table.files[shard], np.uint8, "r")

  def prefetch(self, shard: int, positions: range) -> None:
    """Starts to read the blocks at these positions of a shard."""
    self._reader.prefetch(map(self.table.range, self._find(shard, positions)))

  def _find(self, shard: int, positions: range) -> range:
    start, end = self._starts[shard : shard + 2]
    bounds = np.add(start, [positions.start, positions.stop - 1])
    first_block, last_block = np.searchsorted(
      self._ends, np.minimum(bounds, end - 1), side="right"
    )
    return range(int(first_block), int(last_block) + 1)

  def _open_block(self, block: int) -> tuple[np.ndarray, memoryview]:
    """Returns the entries of a block, and the labels' bytes."""
    span = self.table.range(block)
    if path_lib.is_remote(span.path):
      data = memoryview(self._reader.get(span))
    else:
      # Reading one label from a map reads only a few pages.
      data = self._maps.get(int(self.table.shard[block])).data
      data = data[span.offset : span.offset + span.size]
    count = int(self.table.records[block])
    start = _HEADER.itemsize + count * _ENTRY.itemsize
    header = np.frombuffer(bytes(data[: _HEADER.itemsize]).ljust(8), _HEADER)[0]
    directory = data[_HEADER.itemsize : start]
    if header["count"] != count or header["crc"] != zlib.crc32(directory):
      raise BadRecord(
        f"{span.path.name}:{span.offset}", f"is not a block of {count} labels"
      )
    return np.frombuffer(directory, _ENTRY), data[start:]

  def read(self, shard: int, index: int) -> bytes:
    """Returns a shard's label by index."""
    (block,) = self._find(shard, range(index, index + 1))
    before = self._ends[block] - self.table.records[block]
    entries, data = self._open_block(block)
    return _cut_label(entries, data, int(self._starts[shard] + index - before))

  def find(self, shard: int, positions: range, key: int) -> Iterator[bytes]:
    """Yields the labels with a key's hash in the blocks at these positions."""
    for block in self._find(shard, positions):
      entries, data = self._open_block(block)
      for i in np.flatnonzero(entries["key"] == np.uint64(key)):
        yield _cut_label(entries, data, int(i))


def _cut_label(entries: np.ndarray, data: memoryview, i: int) -> bytes:
  start, end = int(entries["end"][i - 1]) if i else 0, int(entries["end"][i])
  label = bytes(data[start:end])
  if zlib.crc32(label) != entries["crc"][i]:
    raise BadRecord(f"label {i} of a block", "has a wrong checksum")
  return label
