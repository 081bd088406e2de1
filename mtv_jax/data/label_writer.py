"""Writes label sets (see `label_sets`), one base shard after the other.

A shard's files appear when it is complete, and the manifest when all are: a
run that was stopped goes on with the shards that are missing, and several can
share the work by taking different ones.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtv_jax.data import array_records, label_sets, label_values
from mtv_jax.data.label_sets import LabelError
from mtv_jax.data.label_values import BoxLabel, Outcome
from mtv_jax.data.records import BadRecord


@dataclasses.dataclass(frozen=True)
class Entry:
  """The label of one record of the base.

  Attributes:
    key: of the record.
    outcome: its label, or why it has none.
  """

  key: str
  outcome: Outcome


@dataclasses.dataclass
class Summary:
  """What a label set, or a shard of it, holds.

  Attributes:
    records: of the base.
    labelled: those with a label.
    boxes: in all labels, of sets of boxes.
    reasons: what was left out or missing, by reason.
  """

  records: int = 0
  labelled: int = 0
  boxes: int = 0
  reasons: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def add(self, outcome: Outcome) -> None:
    """Counts one record."""
    self.records += 1
    self.labelled += outcome.label is not None
    if isinstance(outcome.label, BoxLabel):
      self.boxes += len(outcome.label.boxes)
    self.reasons.update(outcome.counts)

  def to_dict(self) -> dict[str, Any]:
    """For JSON, the commonest reason first."""
    return dataclasses.asdict(self) | {
      "reasons": dict(self.reasons.most_common())
    }


class LabelWriter:
  """Writes the labels of a source's shards to a folder.

  Args:
    out: the folder, made if needed.
    kind: "depth" or "boxes".
    base: the source, of tars or ArrayRecord files.
    settings: everything that decides what the labels are (JSON): where they
      come from, thresholds, sizes. Shards of other settings are not kept.

  Raises:
    FileExistsError: the folder holds a finished set of another kind, of other
      settings or for another base.
    ValueError: the folder holds the base itself, or two shards of the base
      have the same name.
  """

  def __init__(
    self,
    out: str | os.PathLike,
    *,
    kind: str,
    base: Any,
    settings: Mapping[str, Any],
  ):
    if kind not in label_values.KINDS:
      raise ValueError(f"kind={kind!r}; it is one of {label_values.KINDS}.")
    self.out = Path(out).expanduser()
    self.kind = kind
    self.base = base
    self._settings = dict(settings)
    self._names = [label_sets.stem(file) for file in base.files]
    self._check_names()
    self._ends = base.shards.tolist()
    self._starts = [0, *self._ends[:-1]]
    what = json.dumps([label_sets.VERSION, kind, settings], sort_keys=True)
    self._made_by = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    self.out.mkdir(parents=True, exist_ok=True)
    todo = self.todo()
    if todo and (self.out / label_sets.MANIFEST).exists():
      raise FileExistsError(
        f"{self.out} holds a finished label set, which is not this one: its"
        " kind, settings or base differ. Remove it or give another folder."
      )

  def _check_names(self) -> None:
    twice = [n for n, c in collections.Counter(self._names).items() if c > 1]
    if twice:
      raise ValueError(
        f"{len(twice)} names of shards ({', '.join(twice[:5])}) are there more"
        " than once, in different folders. Make a label set for each folder."
      )
    folders = {file.resolve().parent for file in self.base.files}
    if self.out.resolve() in folders:
      raise ValueError(
        f"{self.out} holds the shards themselves, and labels have the same file"
        " names: give a folder of their own."
      )

  def todo(self) -> list[int]:
    """The shards that are still to be written."""
    return [i for i in range(len(self._names)) if not self._done(i)]

  def _done(self, shard: int) -> bool:
    if not self._stats_file(shard).exists():
      return False
    stats = self._stats(shard)
    return (
      stats.get("made_by") == self._made_by
      and stats.get("records") == self._ends[shard] - self._starts[shard]
      and stats.get("samples") == self._samples(shard)
    )

  def numbers(self, shard: int) -> range:
    """The numbers of a shard's records in the base."""
    return range(self._starts[shard], self._ends[shard])

  def write(self, shard: int, entries: Iterable[Entry]) -> Summary:
    """Writes the labels of one shard.

    Args:
      shard: its place in the base.
      entries: one for each of its records, in their order.

    Raises:
      LabelError: there are more or fewer entries than records.
    """
    summary, keys = Summary(), []

    def encoded() -> Iterator[bytes]:
      for entry in entries:
        summary.add(entry.outcome)
        keys.append(entry.key)
        yield label_values.encode(entry.key, entry.outcome.label)

    file = self.out / f"{self._names[shard]}.array_record"
    stats_file = self._stats_file(shard)
    # First of all: what these say would be of other labels for a moment.
    stats_file.unlink(missing_ok=True)
    array_records.write_bytes(file, encoded())
    if len(keys) != (wanted := len(self.numbers(shard))):
      file.unlink()
      raise LabelError(
        f"{len(keys)} labels were made for {wanted} records of"
        f" {self.base.files[shard]}; each record needs one, in their order, and"
        " one without a label says so."
      )
    hashes = np.array([label_sets.hash_key(key) for key in keys], np.uint64)
    _replace(self.out / f"{self._names[shard]}.keys.npy", _npy(hashes))
    stats = {
      "base": self.base.files[shard].name,
      **summary.to_dict(),
      "keys_hash": hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest(),
      "samples": self._samples(shard),
      "made_by": self._made_by,
    }
    _replace(stats_file, _json(stats))
    return summary

  def finish(self) -> Summary:
    """Writes the manifest; the label set can be used from then on.

    Raises:
      LabelError: shards are missing, or no record at all has a label.
    """
    if todo := self.todo():
      raise LabelError(
        f"{len(todo)} of {len(self._names)} shards have no labels yet"
        f" ({self._names[todo[0]]}, ...): write them before the manifest."
      )
    total, shards = Summary(), []
    for shard in range(len(self._names)):
      stats = self._stats(shard)
      shards.append({k: v for k, v in stats.items() if k != "made_by"})
      total.records += stats["records"]
      total.labelled += stats["labelled"]
      total.boxes += stats["boxes"]
      total.reasons.update(stats["reasons"])
    if not total.labelled:
      reasons = [f"{n} times {reason!r}" for reason, n in total.reasons.items()]
      raise LabelError(
        f"None of the {total.records} records has a label:"
        f" {'; '.join(reasons[:5])}. {self.out} holds nothing to train on."
      )
    manifest = {
      "version": label_sets.VERSION,
      "kind": self.kind,
      "settings": self._settings,
      **total.to_dict(),
      "shards": shards,
    }
    _replace(self.out / label_sets.MANIFEST, _json(manifest))
    return total

  def _samples(self, shard: int) -> list[list[Any]]:
    """Number, key and image hash of a few records that can be read."""
    numbers = self.numbers(shard)
    chosen = {0, len(numbers) // 2, len(numbers) - 1} if numbers else set()
    samples = []
    for at in sorted(chosen):
      try:
        record = self.base[numbers[at]]
      except BadRecord:
        continue
      image = label_sets.hash_image(record["image"])
      samples.append([at, record["key"], image])
    return samples

  def _stats_file(self, shard: int) -> Path:
    return self.out / f"{self._names[shard]}_stats.json"

  def _stats(self, shard: int) -> dict[str, Any]:
    return json.loads(self._stats_file(shard).read_text(encoding="utf-8"))


def _json(content: Any) -> bytes:
  return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _npy(array: np.ndarray) -> bytes:
  stream = io.BytesIO()
  np.save(stream, array, allow_pickle=False)
  return stream.getvalue()


def _replace(file: Path, data: bytes) -> None:
  """Atomically: a reader sees the whole file or none."""
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  temporary.write_bytes(data)
  os.replace(temporary, file)
