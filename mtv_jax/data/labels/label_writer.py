"""Writer of label sets, by any number of processes.

The unit of work is a part: about a thousand records of a shard, in whole
blocks, one file. Once all parts of a shard exist, they are joined into its
files (statistics last), then removed; the manifest is written after all
shards. Processes lease parts (`utils.leases`), and otherwise communicate only
through the names in the folder, which may be in a bucket. So an interrupted run
resumes with the missing parts. Files don't depend on time, host or write order:
equal labels give equal bytes.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import msgpack
import numpy as np

from mtv_jax.data.labels import label_sets, label_values
from mtv_jax.data.labels.label_sets import (
  LabelCounts,
  LabelError,
  hash_bytes,
  to_json,
)
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.sources import block_table
from mtv_jax.data.sources.base import Source
from mtv_jax.utils import leases
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import map_threads

log = logging.getLogger(__name__)

PART_RECORDS = 1000  # Minimum, except for the last part of a shard.
_PART_EXT = ".part"
_SHARD_FILES = (label_sets.SUFFIX, ".keys.npy", "_stats.json")
# Finished shards whose images are compared with the base at a start.
_MAX_CHECKED = 4


@dataclasses.dataclass(frozen=True)
class Entry:
  """A base record's label, or the reason why it lacks one."""

  key: str
  outcome: LabelOutcome
  # `hash_bytes`; "" if the image is unreadable, None if images aren't read.
  image: str | None = None


@dataclasses.dataclass(frozen=True)
class Part:
  """Records of whole blocks of a shard, which one process labels."""

  shard: int
  name: str  # Names its file and its lease.
  numbers: range  # Indices of the base's records.
  blocks: tuple[int, ...]  # Records of each block.


class LabelWriter:
  """Writes labels of a source's shards to a folder, local or in a bucket.

  `settings` (JSON) is everything that determines the labels. With `check`,
  compares images of a few finished shards with the base. Raises FileExistsError
  if the folder has labels of another kind, settings or base.
  """

  def __init__(
    self,
    out: str | os.PathLike,
    *,
    kind: str,
    base: Source,
    settings: Mapping[str, Any],
    check: bool = True,
  ):
    check_choice("kind", kind, label_values.KINDS)
    self.out = path_lib.as_path(out)
    if not path_lib.is_remote(out):
      self.out = self.out.expanduser()
    self.kind = kind
    self.base = base
    self.names = [label_sets.shard_name(file) for file in base.files]
    self._check_files()
    self._starts = [0, *base.shards.tolist()]
    self._parts = self._cut_parts()
    described = label_sets.describe_settings(kind, settings, base)
    self._settings = described["settings"]
    key = json.dumps([label_sets.VERSION, kind, settings], sort_keys=True)
    self._settings_hash = hash_bytes(key.encode())
    label_sets.write_or_check_settings(self.out, described)
    todo = self.todo()
    if todo:
      # Readers of a set with a manifest rely on all files.
      path_lib.remove(self.out / label_sets.MANIFEST)
    if check:
      done = [shard for shard in range(len(self.names)) if shard not in todo]
      for shard in done[:: -(-len(done) // _MAX_CHECKED) or 1]:
        self._check_samples(shard)

  def _check_files(self) -> None:
    if not self.names:
      raise InputError(f"{self.base!r} has no files; expected shards.")
    counts = collections.Counter(self.names)
    if repeated := [name for name, count in counts.items() if count > 1]:
      names = list_first(repeated, 5)
      fix = "Write a label set for each folder."
      raise InputError(f"Several shards are named {names}. {fix}")
    folders = {file.parent for file in self.base.files}
    if any(path_lib.is_same(self.out, folder) for folder in folders):
      raise InputError(f"{self.out} contains the shards themselves.")

  def _cut_parts(self) -> list[list[Part]]:
    parts: list[list[Part]] = [[] for _ in self.names]
    ends, shards, _ = self.base.lane_blocks
    is_last = np.diff(shards, append=len(self.names)) > 0
    columns = (ends.tolist(), shards.tolist(), is_last.tolist())
    start, at, blocks = 0, 0, []
    for end, shard, shard_ends in zip(*columns, strict=True):
      blocks.append(end - at)
      at = end
      if shard_ends or at - start >= PART_RECORDS:
        offset = self._starts[shard]
        name = f"{self.names[shard]}.{start - offset}-{at - offset}{_PART_EXT}"
        parts[shard].append(Part(shard, name, range(start, at), tuple(blocks)))
        start, blocks = at, []
    return parts

  def _check_samples(self, shard: int) -> None:
    """Compares a few images of a finished shard with stored hashes."""
    stats = self._read_stats(shard)
    if stats is None:
      return
    stored, read = stats["samples"], self._read_samples(shard, {})
    if stored != read:
      raise FileExistsError(
        f"The labels of {self.names[shard]} in {self.out} belong to other"
        f" records (number, key, image hash): {stored}, now {read}. Remove the"
        f" folder {self.out}, or choose another one."
      )

  def numbers(self, shard: int) -> range:
    """Base record indices of a shard."""
    return range(self._starts[shard], self._starts[shard + 1])

  def todo(self, shard: int | None = None) -> dict[int, list[Part]]:
    """Returns the missing parts of each unfinished shard, by one listing.

    A shard without missing parts is to be joined. `shard` limits the listing.
    """
    if shard is None:
      names = set(path_lib.list_folder(self.out))
      if label_sets.SETTINGS not in names:
        raise LabelError(
          f"{label_sets.SETTINGS} was removed from {self.out}, by a user or a"
          " process that found no label in the whole set. Start again."
        )
      shards = range(len(self.names))
    else:
      names = path_lib.list_folder(self.out, prefix=self.names[shard])
      names, shards = set(names), [shard]
    return {
      shard: [p for p in self._parts[shard] if p.name not in names]
      for shard in shards
      if not names.issuperset(file.name for file in self._files(shard))
    }

  def is_missing(self, part: Part) -> bool:
    """Whether a part is not yet written."""
    return part in self.todo(part.shard).get(part.shard, [])

  def write(self, part: Part, entries: Iterable[Entry]) -> None:
    """Writes the labels of one part: one entry per record, in order."""
    counts, keys, images, blocks = LabelCounts(), [], [], []
    remaining = iter(entries)
    for count in part.blocks:
      pairs = []
      for entry in itertools.islice(remaining, count):
        counts.add(entry.outcome)
        keys.append(entry.key)
        images.append(entry.image)
        label = label_values.encode(entry.key, entry.outcome.label)
        pairs.append((label_sets.hash_key(entry.key), label))
      blocks.append(label_sets.pack(pairs))
    label_count = len(keys) + sum(1 for _ in remaining)
    if label_count != len(part.numbers):
      raise LabelError(
        f"{label_count} labels for {len(part.numbers)} records of"
        f" {self.base.files[part.shard]}: expected one entry per record, in"
        " order."
      )
    content = {
      "made_by": self._settings_hash,
      "counts": counts.to_dict(),
      "keys": keys,
      "images": images,
      "blocks": blocks,
    }
    # A process that took over the part has removed the temporary file.
    with contextlib.suppress(FileNotFoundError):
      path_lib.write_bytes(self.out / part.name, msgpack.packb(content))

  def _read_part(self, part: Part) -> dict[str, Any]:
    """Reads a part. Removes a damaged one, then raises FileNotFoundError."""
    file = self.out / part.name
    data = path_lib.read_bytes(file)
    try:
      content = msgpack.unpackb(data)
      if content["made_by"] != self._settings_hash:
        raise ValueError("other settings")
      counts = [content["counts"]["records"]]
      counts += [len(content[name]) for name in ("keys", "images")]
      if {*counts} != {len(part.numbers)} or (
        len(content["blocks"]) != len(part.blocks)
      ):
        raise ValueError(f"of {counts} records")
    except (ValueError, LookupError, TypeError) as error:
      log.warning("%s is damaged (%s): it is written again.", file, error)
      path_lib.remove(file)
      raise FileNotFoundError(str(file)) from error
    return content

  def join(self, shard: int) -> bool:
    """Joins the parts of a shard if it is unfinished and all parts exist."""
    if self.todo(shard) == {shard: []}:
      with contextlib.suppress(FileNotFoundError):
        self._write_shard(shard)
    if not self.todo(shard):
      self._remove_parts(shard)
    return True

  def _write_shard(self, shard: int) -> None:
    labels_file, keys_file, stats_file = self._files(shard)
    # The statistics mark the shard as finished.
    path_lib.remove(stats_file)
    summary, keys, images, sizes = LabelCounts(), [], [], []
    with (
      path_lib.replace_file(labels_file) as temporary,
      temporary.open("wb") as stream,
    ):
      for part in self._parts[shard]:
        content = self._read_part(part)
        stream.writelines(content["blocks"])
        summary.merge(content["counts"])
        keys += content["keys"]
        images += content["images"]
        sizes += map(len, content["blocks"])
    if len({*keys}) < len(keys):
      # An index and a table of blocks order the records of a tar differently.
      raise LabelError(
        f"The parts of {self.names[shard]} in {self.out} repeat a record: its"
        " table of blocks was written, or removed, in between. Remove the"
        f" parts ({self.names[shard]}.*{_PART_EXT}) and label again."
      )
    hashes = np.array([label_sets.hash_key(key) for key in keys], np.uint64)
    stream = io.BytesIO()
    np.save(stream, hashes, allow_pickle=False)
    path_lib.write_bytes(keys_file, stream.getvalue())
    counts = [count for part in self._parts[shard] for count in part.blocks]
    samples_by_row = {
      row: (keys[row], image) for row, image in enumerate(images) if image
    }
    stats = {
      "base": self.base.files[shard].name,
      **summary.to_dict(),
      "keys_hash": hash_bytes(hashes.tobytes()),
      **_hash_base(keys, images),
      "samples": self._read_samples(shard, samples_by_row),
      "made_by": self._settings_hash,
      "blocks": list(zip(sizes, counts, strict=True)),
    }
    path_lib.write_bytes(stats_file, to_json(stats))

  def _remove_parts(self, shard: int) -> None:
    name = self.names[shard]
    pattern = re.compile(rf"{re.escape(name)}\.\d+-\d+{re.escape(_PART_EXT)}")
    names = path_lib.list_folder(self.out, prefix=f"{name}.")
    files = [self.out / n for n in names if pattern.fullmatch(n)]
    map_threads(path_lib.remove, files)

  def finish(self) -> LabelCounts | None:
    """Writes the manifest, which completes the label set.

    Returns None if shards are unfinished or their statistics are damaged.
    `base_hash`, present if all images were read, hashes keys and images.
    """
    file = self.out / label_sets.MANIFEST
    if path_lib.exists(file) and path_lib.exists(self.out / block_table.NAME):
      counts = LabelCounts()
      counts.merge(json.loads(path_lib.read_bytes(file)))
      return counts
    if self.todo():
      return None
    all_stats = map_threads(self._read_stats, range(len(self.names)))
    if None in all_stats:
      for shard, stats in enumerate(all_stats):
        if stats is None:
          log.warning("%s is damaged: it is written again.", self.names[shard])
          path_lib.remove(self._files(shard)[-1])
      return None
    total, shards, blocks = LabelCounts(), [], []
    for stats in all_stats:
      total.merge(stats)
      blocks.append(stats.pop("blocks"))
      shards.append({k: v for k, v in stats.items() if k != "made_by"})
    counts = total.to_dict()
    if not total.labelled:
      # Nothing to protect: let a run with different settings start.
      path_lib.remove(self.out / label_sets.SETTINGS)
      files = [self._files(shard)[-1] for shard in range(len(self.names))]
      map_threads(path_lib.remove, files)
      reasons = [f"{n} times {r!r}" for r, n in counts["reasons"].items()]
      raise LabelError(
        f"None of the {total.records} records has a label:"
        f" {'; '.join(reasons[:5])}. Remove {self.out}."
      )
    for name in path_lib.list_folder(self.out):
      if name.endswith(_PART_EXT):  # Left by a killed process.
        path_lib.remove(self.out / name)
    self._write_table(blocks)
    manifest = {
      "version": label_sets.VERSION,
      "kind": self.kind,
      "settings": self._settings,
      **_hash_base(self.names, [shard.get("base_hash") for shard in shards]),
      **counts,
      "shards": shards,
    }
    path_lib.write_bytes(file, to_json(manifest))
    return total

  def _write_table(self, blocks: Sequence[Sequence[Sequence[int]]]) -> None:
    """Writes the block table, given each shard's (bytes, records) per block."""
    tables = []
    for shard, rows in enumerate(blocks):
      size, records = np.array(rows, np.int64).reshape(-1, 2).T
      columns = block_table.as_columns(
        np.stack([np.cumsum(size) - size, size, records, records], 1)
      )
      # Without a version: copying a label set changes its files'.
      state = int(size.sum()), ""
      tables.append(
        block_table.of_file(self._files(shard)[0], state, columns, per_block=0)
      )
    block_table.join(tables).write(self.out / block_table.NAME)

  def _read_samples(
    self, shard: int, samples_by_row: Mapping[int, tuple[str, str]]
  ) -> list[list[Any]]:
    """Returns the row, key and image hash of a few readable records.

    Records missing from `samples_by_row` are read.
    """
    numbers = self.numbers(shard)
    sampled_rows = (
      {0, len(numbers) // 2, len(numbers) - 1} if numbers else set()
    )
    read_sample = label_sets.read_sample
    samples = (
      (row, samples_by_row.get(row) or read_sample(self.base, numbers[row]))
      for row in sorted(sampled_rows)
    )
    return [[row, *sample] for row, sample in samples if sample]

  def _files(self, shard: int) -> tuple[PurePath, PurePath, PurePath]:
    """Files of a shard: labels, key hashes, statistics."""
    name = self.names[shard]
    labels, keys, stats = (self.out / f"{name}{end}" for end in _SHARD_FILES)
    return labels, keys, stats

  def _read_stats(self, shard: int) -> dict[str, Any] | None:
    """A shard's statistics; None if missing, damaged or of other settings."""
    *_, file = self._files(shard)
    stats = path_lib.read_json(file)
    expected = self._settings_hash, len(self.numbers(shard))
    if not isinstance(stats, dict) or (
      (stats.get("made_by"), stats.get("records")) != expected
    ):
      return None
    return stats


def write_all(
  writer: LabelWriter,
  make_entries: Callable[[range], Iterator[Entry]],
  *,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelCounts:
  """Writes all parts that no other process writes, and completes the set.

  Returns when all processes have written all parts; parts of dead processes are
  taken over. `make_entries` yields the entries of these records, in order.
  `progress` receives the number of records done by all processes and the total.
  Raises LabelError if all records lack a label.
  """
  job = _WriteJob(writer, make_entries, progress)
  leases.run_jobs(job.leases, job.list)
  job.leases.clear()
  return job.counts


class _WriteJob:
  def __init__(
    self,
    writer: LabelWriter,
    make_entries: Callable[[range], Iterator[Entry]],
    progress: Callable[[int, int], None],
  ):
    self._writer, self._make_entries = writer, make_entries
    self._progress = progress
    self.leases = leases.open_leases(writer.out)
    self._done = 0
    self.counts: LabelCounts | None = None  # Set by `_finish`.

  def list(self) -> leases.Jobs:
    """Missing parts, shards to join, or the manifest."""
    if self.counts:
      return {}
    writer = self._writer
    todo, total = writer.todo(), len(writer.base)
    parts = [part for shard_parts in todo.values() for part in shard_parts]
    self._done = total - sum(len(part.numbers) for part in parts)
    self._progress(self._done, total)
    jobs = {part.name: functools.partial(self._write, part) for part in parts}
    for shard in todo:
      if not todo[shard]:
        jobs[writer.names[shard]] = functools.partial(writer.join, shard)
    return jobs or {"manifest": self._finish}

  def _write(self, part: Part) -> bool:
    writer = self._writer
    if not writer.is_missing(part):
      return False
    with contextlib.closing(self._count_entries(part.numbers)) as entries:
      writer.write(part, entries)
    if not writer.todo(part.shard).get(part.shard):
      with self.leases.acquire(writer.names[part.shard]) as acquired:
        if acquired:
          writer.join(part.shard)
    return True

  def _finish(self) -> bool:
    self.counts = self._writer.finish()
    return True

  def _count_entries(self, numbers: range) -> Iterator[Entry]:
    total = len(self._writer.base)
    for entry in self._make_entries(numbers):
      self._done += 1
      self._progress(min(self._done, total), total)
      yield entry


def _hash_base(names: list[str], hashes: list[str | None]) -> Mapping[str, str]:
  """`base_hash` over names and hashes; empty if a hash is unknown."""
  if None in hashes:
    return {}
  lines = "".join(f"{n}\0{h}\n" for n, h in zip(names, hashes, strict=True))
  digest = hashlib.blake2b(lines.encode(), digest_size=16)
  return {"base_hash": digest.hexdigest()}
