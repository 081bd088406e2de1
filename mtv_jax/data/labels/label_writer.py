"""Writer of label sets, one base shard after the other.

A shard's files appear when it is complete, and the manifest when all are: a
run that was stopped goes on with the shards that are missing, and several can
share the work by taking different ones. No file holds when, where or in which
order it was made, so that the same labels are the same bytes.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from mtv_jax.data.labels import (
  label_sets,
  label_values,
)
from mtv_jax.data.labels import (
  settings as label_settings,
)
from mtv_jax.data.labels.label_sets import LabelError
from mtv_jax.data.labels.label_values import BoxLabel, Outcome
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources import array_record
from mtv_jax.data.sources.base import Source
from mtv_jax.utils import atomic
from mtv_jax.utils.errors import InputError

_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Entry:
  """The label of one record of the base.

  Attributes:
    key: of the record.
    outcome: its label, or why it has none.
    image: `hash_image` of its picture, "" if that can't be read; None where
      nobody has read it.
  """

  key: str
  outcome: Outcome
  image: str | None = None


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
    """A JSON object, the most frequent reason first."""
    return dataclasses.asdict(self) | {"reasons": dict(self.ranked())}

  def ranked(self) -> list[tuple[str, int]]:
    """Reasons and counts, most frequent first, then by name."""
    return sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))

  def format_summary(self, kind: str, out: str | os.PathLike) -> str:
    """The counts and reasons as text."""
    boxes = f" with {self.boxes:,} boxes" if kind == "boxes" else ""
    lines = [
      f"{self.labelled:,} of {self.records:,} records have a label{boxes}, in"
      f" {out}."
    ]
    lines += [f"  {n:,} times: {reason}" for reason, n in self.ranked()]
    return "\n".join(lines)


class LabelWriter:
  """Writes the labels of a source's shards to a folder.

  Args:
    out: the folder, made if needed.
    kind: "depth" or "boxes".
    base: the source, which must have files.
    settings: everything that decides what the labels are (JSON): where they
      come from, thresholds, sizes.

  Raises:
    FileExistsError: the folder holds labels, finished or not, of another
      kind, of other settings or for another base; says what differs.
    InputError: the base has no files, two of its shards have the same name,
      or the folder holds the base itself.
  """

  def __init__(
    self,
    out: str | os.PathLike,
    *,
    kind: str,
    base: Source,
    settings: Mapping[str, Any],
  ):
    if kind not in label_values.KINDS:
      raise InputError(f"kind={kind!r}; it is one of {label_values.KINDS}.")
    if not base.files:
      raise InputError(
        f"{base!r} has no files; label sets are written for the shards of a"
        " source of files, such as tars."
      )
    self.out = Path(out).expanduser()
    self.kind = kind
    self.base = base
    self.names = [label_sets.stem(file) for file in base.files]
    self._check_names()
    self._ends = base.shards.tolist()
    self._starts = [0, *self._ends[:-1]]
    described = label_settings.describe(kind, settings, base)
    self._settings = described["settings"]
    what = json.dumps([label_sets.VERSION, kind, settings], sort_keys=True)
    self._made_by = hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    self.out.mkdir(parents=True, exist_ok=True)
    label_settings.write_or_check_settings(self.out, described)
    self._finished: set[int] = set()
    self._check_images()

  def _check_names(self) -> None:
    twice = [n for n, c in collections.Counter(self.names).items() if c > 1]
    if twice:
      raise InputError(
        f"{len(twice)} names of shards ({', '.join(twice[:5])}) are there more"
        " than once, in different folders. Make a label set for each folder."
      )
    folders = {file.resolve().parent for file in self.base.files}
    if self.out.resolve() in folders:
      raise InputError(
        f"{self.out} holds the shards themselves, and labels have the same file"
        " names: give a folder of their own."
      )

  def _check_images(self) -> None:
    """Compares a few images of the finished shards with those they had."""

    def check(shard: int) -> None:
      if not self.done(shard):
        return
      there, here = self._stats(shard)["samples"], self._samples(shard)
      if there != here:
        raise FileExistsError(
          f"The labels of {self.names[shard]} in {self.out} were made for other"
          " records (number, key, hash of the image; there -> here):\n "
          f" {there} -> {here}\nRemove the folder to make them anew, or give"
          " another one."
        )

    with futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(check, range(len(self.names))))

  def todo(self) -> list[int]:
    """The shards that are still to be written."""
    # One listing costs less than looking for each file. A shard without one
    # of its files is made again, whoever took it away.
    there = set(os.listdir(self.out))
    todo = []
    for i in range(len(self.names)):
      if there.issuperset(self._files(i)) and self.done(i):
        continue
      self._finished.discard(i)
      todo.append(i)
    return todo

  def done(self, shard: int) -> bool:
    """Whether a shard is written, by whomever."""
    if shard not in self._finished:
      try:
        stats = dict(self._stats(shard))
      except (FileNotFoundError, ValueError, TypeError):
        # One that is damaged says nothing: the shard is made again.
        return False
      if not all((self.out / file).exists() for file in self._files(shard)):
        return False
      records = len(self.numbers(shard))
      if (stats.get("made_by"), stats.get("records")) != (
        self._made_by,
        records,
      ):
        return False
      self._finished.add(shard)
    return True

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
    summary, keys, images = Summary(), [], []

    def encoded() -> Iterator[bytes]:
      for entry in entries:
        summary.add(entry.outcome)
        keys.append(entry.key)
        images.append(entry.image)
        yield label_values.encode(entry.key, entry.outcome.label)

    file = self.out / f"{self.names[shard]}.array_record"
    stats_file = self._stats_file(shard)
    if not self.done(shard):
      # What these say would be of other labels for a moment.
      stats_file.unlink(missing_ok=True)
    array_record.write_bytes(file, encoded())
    if len(keys) != (wanted := len(self.numbers(shard))):
      file.unlink()
      raise LabelError(
        f"{len(keys)} labels were made for {wanted} records of"
        f" {self.base.files[shard]}; each record needs one, in their order, and"
        " one without a label says so."
      )
    hashes = np.array([label_sets.hash_key(key) for key in keys], np.uint64)
    atomic.write(self.out / f"{self.names[shard]}.keys.npy", _npy(hashes))
    stats = {
      "base": self.base.files[shard].name,
      **summary.to_dict(),
      "keys_hash": hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest(),
      **({} if None in images else {"base_hash": _hash(keys, images)}),
      "samples": self._samples(shard),
      "made_by": self._made_by,
    }
    atomic.write(stats_file, _json(stats))
    return summary

  def finish(self) -> Summary:
    """Writes the manifest; the label set can be used from then on.

    It has all settings, and of each shard what its labels were made for: a
    hash of its keys, one of its keys and images (`base_hash`) where whoever
    made the labels has read all images, and key and image of a few records.
    Of several processes each may do this.

    Raises:
      LabelError: shards are missing, or no record at all has a label.
    """
    if todo := self.todo():
      raise LabelError(
        f"{len(todo)} of {len(self.names)} shards have no labels yet"
        f" ({self.names[todo[0]]}, ...): write them before the manifest."
      )
    total, shards = Summary(), []
    for shard in range(len(self.names)):
      stats = self._stats(shard)
      shards.append({k: v for k, v in stats.items() if k != "made_by"})
      total.records += stats["records"]
      total.labelled += stats["labelled"]
      total.boxes += stats["boxes"]
      total.reasons.update(stats["reasons"])
    if not total.labelled:
      # Worth nothing, and so nothing to protect from other settings.
      (self.out / label_settings.FILE).unlink(missing_ok=True)
      reasons = [f"{n} times {reason!r}" for reason, n in total.ranked()]
      raise LabelError(
        f"None of the {total.records} records has a label:"
        f" {'; '.join(reasons[:5])}. {self.out} holds nothing to train on:"
        " remove it."
      )
    hashes = [shard.get("base_hash") for shard in shards]
    manifest = {
      "version": label_sets.VERSION,
      "kind": self.kind,
      "settings": self._settings,
      **({} if None in hashes else {"base_hash": _hash(self.names, hashes)}),
      **total.to_dict(),
      "shards": shards,
    }
    atomic.write(self.out / label_sets.MANIFEST, _json(manifest))
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

  def _files(self, shard: int) -> tuple[str, ...]:
    name = self.names[shard]
    return f"{name}.array_record", f"{name}.keys.npy", f"{name}_stats.json"

  def _stats_file(self, shard: int) -> Path:
    return self.out / f"{self.names[shard]}_stats.json"

  def _stats(self, shard: int) -> dict[str, Any]:
    return json.loads(self._stats_file(shard).read_text(encoding="utf-8"))


def _json(content: Any) -> bytes:
  return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _hash(names: list[str], hashes: list[str]) -> str:
  """One hash of what belongs to names, in their order."""
  lines = "".join(f"{n}\0{h}\n" for n, h in zip(names, hashes, strict=True))
  return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _npy(array: np.ndarray) -> bytes:
  stream = io.BytesIO()
  np.save(stream, array, allow_pickle=False)
  return stream.getvalue()
