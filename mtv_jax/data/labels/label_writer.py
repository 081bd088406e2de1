"""Writer of label sets, one base shard at a time.

A shard's statistics file is written after its labels, and the manifest after
all shards. So an interrupted run resumes with the unfinished shards, and
several processes can write different shards. Files don't depend on time, host
or write order: equal labels give equal bytes.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtv_jax.data.labels import label_blocks, label_sets, label_values
from mtv_jax.data.labels.label_sets import LabelError, hash_bytes, to_json
from mtv_jax.data.labels.label_values import BoxLabel, LabelOutcome
from mtv_jax.data.sources import array_record, block_table
from mtv_jax.data.sources.base import Source
from mtv_jax.data.sources.block_table import BlockTable
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.path import refuse_remote
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import map_threads


@dataclasses.dataclass(frozen=True)
class Entry:
  """A base record's label, or the reason why it lacks one."""

  key: str
  outcome: LabelOutcome
  # `hash_bytes`; "" if the image is unreadable, None if images aren't read.
  image: str | None = None


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

  def to_dict(self) -> dict[str, Any]:
    """As a JSON object; reasons by descending count, then by name."""
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


class LabelWriter:
  """Writes the labels of a source's shards to a folder.

  `settings` (JSON) is everything that determines the labels. Raises
  FileExistsError if the folder has labels of another kind, settings or base.
  """

  def __init__(
    self,
    out: str | os.PathLike,
    *,
    kind: str,
    base: Source,
    settings: Mapping[str, Any],
  ):
    check_choice("kind", kind, label_values.KINDS)
    refuse_remote(out, "The output", "Write labels to a folder, and copy it.")
    self.out = Path(out).expanduser()
    self.kind = kind
    self.base = base
    self.names = [label_sets.shard_name(file) for file in base.files]
    self._check_files()
    self._starts = [0, *base.shards.tolist()]
    # An unfinished set of version 1 is finished as such.
    self._version = label_sets.stored_version(self.out)
    described = label_sets.describe_settings(
      kind, settings, base, self._version
    )
    self._settings = described["settings"]
    key = json.dumps([self._version, kind, settings], sort_keys=True)
    self._settings_hash = hash_bytes(key.encode())
    self.out.mkdir(parents=True, exist_ok=True)
    label_sets.write_or_check_settings(self.out, described)
    self._finished: set[int] = set()
    map_threads(self._check_samples, range(len(self.names)))

  def _check_files(self) -> None:
    if not self.names:
      raise InputError(f"{self.base!r} has no files: expected, say, tars.")
    counts = collections.Counter(self.names)
    if repeated := [name for name, count in counts.items() if count > 1]:
      names = list_first(repeated, 5)
      fix = "Write a label set for each folder."
      raise InputError(f"Several shards are named {names}. {fix}")
    if self.out.resolve() in {f.resolve().parent for f in self.base.files}:
      raise InputError(f"{self.out} contains the shards themselves.")

  def _check_samples(self, shard: int) -> None:
    """Compares a few images of a finished shard with stored hashes."""
    if not self.is_done(shard):
      return
    stored, read = self._stats(shard)["samples"], self._samples(shard)
    if stored != read:
      raise FileExistsError(
        f"The labels of {self.names[shard]} in {self.out} are of other records"
        f" (number, key, hash of the image): {stored}, now {read}. Remove it."
      )

  def todo(self) -> list[int]:
    """Returns unfinished shards, including shards with a missing file."""
    # One listing is faster than looking up every file.
    existing = set(os.listdir(self.out))
    todo = []
    for shard in range(len(self.names)):
      files = {file.name for file in self._files(shard)}
      if not (files <= existing and self.is_done(shard)):
        self._finished.discard(shard)
        todo.append(shard)
    return todo

  def is_done(self, shard: int) -> bool:
    """Whether this or another process has finished the shard."""
    if shard in self._finished:
      return True
    try:
      stats = dict(self._stats(shard))
    except (FileNotFoundError, ValueError, TypeError):
      return False  # Missing or corrupt.
    expected = self._settings_hash, len(self.numbers(shard))
    if (stats.get("made_by"), stats.get("records")) != expected:
      return False
    if not all(file.exists() for file in self._files(shard)):
      return False
    self._finished.add(shard)
    return True

  def numbers(self, shard: int) -> range:
    """Base record indices of a shard."""
    return range(self._starts[shard], self._starts[shard + 1])

  def write(self, shard: int, entries: Iterable[Entry]) -> LabelCounts:
    """Writes the labels of one shard: one entry per record, in order."""
    summary, keys, images = LabelCounts(), [], []

    def encoded() -> Iterator[tuple[int, bytes]]:
      for entry in entries:
        summary.add(entry.outcome)
        keys.append(entry.key)
        images.append(entry.image)
        label = label_values.encode(entry.key, entry.outcome.label)
        yield label_sets.hash_key(entry.key), label

    labels_file, keys_file, stats_file = self._files(shard)
    if not self.is_done(shard):
      # The statistics are stale while the new labels are written.
      stats_file.unlink(missing_ok=True)
    labels, blocks = encoded(), []
    if self._version == 1:
      array_record.write_bytes(labels_file, (label for _, label in labels))
    else:
      counts = self._block_counts(shard)
      sizes = label_blocks.write(labels_file, labels, counts)
      blocks = list(zip(sizes, counts, strict=True))
    collections.deque(labels, maxlen=0)  # Counts those beyond the records.
    if len(keys) != (expected := len(self.numbers(shard))):
      labels_file.unlink()
      raise LabelError(
        f"{len(keys)} labels for {expected} records of"
        f" {self.base.files[shard]}: expected one entry per record, in order."
      )
    hashes = np.array([label_sets.hash_key(key) for key in keys], np.uint64)
    stream = io.BytesIO()
    np.save(stream, hashes, allow_pickle=False)
    atomic.write(keys_file, stream.getvalue())
    stats = {
      "base": self.base.files[shard].name,
      **summary.to_dict(),
      "keys_hash": hash_bytes(hashes.tobytes()),
      **_base_hash(keys, images),
      "samples": self._samples(shard),
      "made_by": self._settings_hash,
      "blocks": blocks,
    }
    atomic.write(stats_file, to_json(stats))
    return summary

  def finish(self) -> LabelCounts:
    """Writes the manifest, which completes the label set.

    Several processes may do this. `base_hash`, present if all images were read,
    hashes keys and images.
    """
    if todo := self.todo():
      count = f"{len(todo)} of {len(self.names)} shards"
      first = self.names[todo[0]]
      raise LabelError(f"{count} have no labels yet ({first}, ...).")
    total, shards = LabelCounts(), []
    blocks = []
    for stats in map(self._stats, range(len(self.names))):
      blocks.append(stats.pop("blocks", []))
      shards.append({k: v for k, v in stats.items() if k != "made_by"})
      total.records += stats["records"]
      total.labelled += stats["labelled"]
      total.boxes += stats["boxes"]
      total.reasons.update(stats["reasons"])
    counts = total.to_dict()
    if not total.labelled:
      # Nothing to protect: let a run with different settings start.
      (self.out / label_sets.SETTINGS).unlink(missing_ok=True)
      reasons = [f"{n} times {r!r}" for r, n in counts["reasons"].items()]
      raise LabelError(
        f"None of the {total.records} records has a label:"
        f" {'; '.join(reasons[:5])}. Remove {self.out}."
      )
    if self._version > 1:
      self._write_table(blocks)
    manifest = {
      "version": self._version,
      "kind": self.kind,
      "settings": self._settings,
      **_base_hash(self.names, [shard.get("base_hash") for shard in shards]),
      **counts,
      "shards": shards,
    }
    atomic.write(self.out / label_sets.MANIFEST, to_json(manifest))
    return total

  def _block_counts(self, shard: int) -> list[int]:
    """Records of each block of a base shard."""
    blocks = self.base.lane_blocks
    ends = blocks.ends[blocks.shard == shard]
    return np.diff(ends, prepend=self._starts[shard]).tolist()

  def _write_table(self, blocks: Sequence[Sequence[Sequence[int]]]) -> None:
    """Writes the table of blocks, given (size, records) by shard."""
    files = [self._files(shard)[0] for shard in range(len(self.names))]
    rows = [block for of_shard in blocks for block in of_shard]
    size, records = np.array(rows, np.int64).reshape(-1, 2).T
    offsets = [np.cumsum([0, *(n for n, _ in b)])[:-1] for b in blocks]
    table = BlockTable(
      files=tuple(files),
      sizes=tuple(sum(n for n, _ in of_shard) for of_shard in blocks),
      # Label sets are copied, which changes versions.
      versions=("",) * len(files),
      shard=np.repeat(np.arange(len(files)), [len(b) for b in blocks]),
      offset=np.concatenate([np.zeros(0, np.int64), *offsets]),
      size=size,
      records=records,
      captioned=records,
    )
    table.write(self.out / block_table.NAME)

  def _samples(self, shard: int) -> list[list[Any]]:
    """Index, key and image hash of a few readable records."""
    numbers = self.numbers(shard)
    chosen = {0, len(numbers) // 2, len(numbers) - 1} if numbers else set()
    return [
      [at, *sample]
      for at in sorted(chosen)
      if (sample := label_sets.read_sample(self.base, numbers[at]))
    ]

  def _files(self, shard: int) -> tuple[Path, Path, Path]:
    """Files of a shard: labels, key hashes, statistics."""
    labels = ".array_record" if self._version == 1 else label_blocks.SUFFIX
    ends = labels, ".keys.npy", "_stats.json"
    labels, keys, stats = (self.out / f"{self.names[shard]}{e}" for e in ends)
    return labels, keys, stats

  def _stats(self, shard: int) -> dict[str, Any]:
    *_, file = self._files(shard)
    return json.loads(file.read_text(encoding="utf-8"))


def _base_hash(names: list[str], hashes: list[str | None]) -> Mapping[str, str]:
  """`base_hash` over names and hashes; empty if a hash is unknown."""
  if None in hashes:
    return {}
  lines = "".join(f"{n}\0{h}\n" for n, h in zip(names, hashes, strict=True))
  digest = hashlib.blake2b(lines.encode(), digest_size=16)
  return {"base_hash": digest.hexdigest()}
