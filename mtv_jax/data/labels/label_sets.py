"""Label sets: folders of labels for the records of shards.

  manifest.json         what it is: kind, settings, counts, the base's shards
  00000.array_record    a label for every record of the base's 00000, in order
  00000.keys.npy        uint64, a hash of each record's key, for joins by key
  00000_stats.json      what the manifest says of this shard

A record without a label has one that says so, never a gap: record i of a base
shard and label i of its file belong together. Every label holds its record's
key, and the manifest a few of the base's keys and image hashes.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import Stored
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import array_record
from mtv_jax.utils.errors import InputError, MissingFileError
from mtv_jax.utils.process_cache import ProcessCache

VERSION = 1
MANIFEST = "manifest.json"
_SUFFIXES = (".tar", ".array_record", ".parquet")
_THREADS = 16


class LabelError(InputError):
  """A label set that can't be used with these shards, or at all."""


def stem(file: Path) -> str:
  """What a base shard and its labels have in common: "00000"."""
  for suffix in _SUFFIXES:
    if file.name.endswith(suffix):
      return file.name[: -len(suffix)]
  return file.name


def hash_key(key: str) -> int:
  """64 bits of a record's key."""
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


def hash_image(image: bytes) -> str:
  """64 bits of an image file, in hexadecimal."""
  return hashlib.blake2b(image, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
  """What a manifest says of one shard.

  Attributes:
    base: name of the base's file.
    records: of it, and so of the file of labels.
    samples: (number, key, image hash) of a few of the base's records.
  """

  base: str
  records: int
  samples: Sequence[tuple[int, str, str]]


class LabelSet:
  """The labels of a folder, by shard and number.

  Args:
    folder: of the label set.
    kind: "depth" or "boxes", which it must be of.

  Attributes:
    folder: of the set.
    kind: of its labels.
    manifest: the whole of it.
    names: its shards, without suffix, in order.
    shards: what the manifest says of each.
    digest: of the manifest; another one is another set.

  Raises:
    MissingFileError: no such folder, no manifest or a missing file.
    LabelError: another kind or version, or files that are not those that the
      manifest tells of.
  """

  def __init__(self, folder: str | os.PathLike, *, kind: str):
    self.folder = Path(folder).expanduser()
    self.kind = kind
    text = _read_manifest(self.folder)
    self.digest = hashlib.blake2b(text, digest_size=8).hexdigest()
    self.manifest = _parse_manifest(text, self.folder, kind)
    self.shards = [
      Shard(s["base"], s["records"], [tuple(x) for x in s["samples"]])
      for s in self.manifest["shards"]
    ]
    self.names = [stem(Path(shard.base)) for shard in self.shards]
    files = [self.folder / f"{name}.array_record" for name in self.names]
    self._check_files(files)
    self._files = files
    # Half of what others take: a source may have two sets beside its own
    # files, and they must stay within the process's limit together.
    self._readers = ProcessCache(
      functools.partial(array_record.open_reader, files), descriptors=2
    )

  def _check_files(self, files: list[Path]) -> None:
    if missing := [file.name for file in files if not file.exists()]:
      raise MissingFileError(
        f"{len(missing)} of {len(files)} files of the label set {self.folder}"
        f" are missing: {', '.join(missing[:8])}. Copy or make them again."
      )
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      counts = list(pool.map(array_record.count_records, files))
    for file, count, shard in zip(files, counts, self.shards, strict=True):
      if count != shard.records:
        raise LabelError(
          f"{file} holds {count} labels, {MANIFEST} beside it says"
          f" {shard.records}: they are of different sets. Make the set again."
        )

  def __len__(self) -> int:
    return sum(shard.records for shard in self.shards)

  def read(self, shard: int, at: int) -> Stored:
    """Label `at` of a shard.

    Raises:
      BadRecord: if its bytes are damaged.
    """
    where = f"{self.folder.name}/{self._files[shard].name}:{at}"
    try:
      (data,) = self._readers.get(shard).read([at])
    except (RuntimeError, IndexError, ValueError) as error:
      raise BadRecord(where, f"can't be read ({error})") from error
    return label_values.decode(data, kind=self.kind, where=where)

  def key_hashes(self, shard: int) -> UInt64[np.ndarray, "n"]:
    """`hash_key` of each record of a shard."""
    file = self.folder / f"{self.names[shard]}.keys.npy"
    if not file.exists():
      raise MissingFileError(
        f"The label set {self.folder} has no {file.name}, which a join by key"
        " needs. Copy it from where the set was made, or make it again."
      )
    hashes = np.load(file, allow_pickle=False)
    if hashes.shape != (self.shards[shard].records,):
      raise LabelError(
        f"{file} is of {hashes.shape}, expected {self.shards[shard].records}"
        " hashes: it is of another set. Make the set again."
      )
    return hashes.astype(np.uint64)

  def __repr__(self) -> str:
    return f"LabelSet({self.kind}, {self.folder}, {len(self)} records)"


def _read_manifest(folder: Path) -> bytes:
  if not folder.is_dir():
    raise MissingFileError(f"There is no folder of labels {folder}.")
  file = folder / MANIFEST
  if not file.exists():
    raise MissingFileError(
      f"{folder} has no {MANIFEST}: it is no label set, or one that is not"
      " finished. Run the command that makes it again; it goes on where it"
      " stopped."
    )
  return file.read_bytes()


def _parse_manifest(text: bytes, folder: Path, kind: str) -> Mapping[str, Any]:
  file = folder / MANIFEST
  try:
    manifest = json.loads(text)
    version, found = manifest["version"], manifest["kind"]
    # Named here, so that a file that lacks one is told of by its name.
    for shard in manifest["shards"]:
      _ = shard["base"], shard["records"], shard["samples"]
  except (ValueError, KeyError, TypeError) as error:
    raise LabelError(
      f"{file} is no manifest of a label set ({type(error).__name__}: {error})."
    ) from error
  if version != VERSION:
    raise LabelError(
      f"{file} is of version {version}, this code reads {VERSION}: make the"
      " labels again."
    )
  if found != kind:
    raise LabelError(
      f"{folder} holds labels of kind {found!r}, given as {kind!r}. Write"
      f" labels=dict({found}={str(folder)!r})."
    )
  return manifest
