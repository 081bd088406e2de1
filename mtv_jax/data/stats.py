"""Counts of records read: bad records, dropped labels, flawed texts."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal

from mtv_jax.utils.errors import UserError, printable

log = logging.getLogger(__name__)

# Records (or one epoch, if shorter) before the shares are checked.
_MIN_RECORDS = 1000
# Warn if a larger share of texts is truncated, or has unknown words.
_MAX_CUT, _MAX_UNKNOWN = 0.2, 0.02
_LENGTH_OPTIONS = {
  "captions": "the length of `caption` with model.text.length",
  "conversations": "the length of `conversation`",
  "phrases": "phrase_length of `regions`",
}
# Bad records: log the first ones, then one in `_LOG_EVERY`.
_MAX_LOGGED, _LOG_EVERY = 20, 100
# Fields of `Stats`.
_counter_field = functools.partial(
  dataclasses.field, default_factory=collections.Counter
)
_COUNTERS = ("dropped", "texts")


class CorruptDataError(UserError, RuntimeError):
  """Raised if more records are unusable than `data.max_corrupt` allows."""


@dataclasses.dataclass
class Stats:
  """Counts of the records in this host's batches so far."""

  read: int = 0  # Includes bad records.
  corrupt: int = 0  # Bad records, counted again in every epoch.
  # Reasons by "source/key", for the first thousand bad records.
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)
  # Dropped labels or parts of labels, by "source: reason".
  dropped: collections.Counter[str] = _counter_field()
  # Texts in batches by kind, such as `captions`: all, truncated ones
  # (`captions_cut`), and ones with unknown words (`captions_unknown`).
  texts: collections.Counter[str] = _counter_field()

  def snapshot(self) -> "Stats":
    """Returns a copy, without the reasons."""
    counts = {k: getattr(self, k).copy() for k in _COUNTERS}
    return dataclasses.replace(self, reasons={}, **counts)

  def to_dict(self) -> dict[str, Any]:
    """Returns the counts, for a checkpoint."""
    counts = {k: dict(getattr(self, k)) for k in _COUNTERS}
    return {"read": self.read, "corrupt": self.corrupt, **counts}

  @classmethod
  def from_dict(cls, counts: Mapping[str, Any]) -> "Stats":
    """Restores the counts of `to_dict`; missing ones are zero."""
    counters = {k: collections.Counter(counts.get(k, {})) for k in _COUNTERS}
    return cls(counts.get("read", 0), counts.get("corrupt", 0), **counters)

  def fraction(self, kind: Literal["cut", "unknown"]) -> dict[str, float]:
    """Fraction of texts truncated, or with unknown words, by kind of text."""
    totals = {k: self.texts[k] for k in _LENGTH_OPTIONS if self.texts[k]}
    return {k: self.texts[f"{k}_{kind}"] / n for k, n in totals.items()}

  def count_bad(self, source: str, key: str, reason: str) -> None:
    """Counts a bad record; logs some of them."""
    self.corrupt += 1
    if len(self.reasons) < 1000:
      self.reasons[f"{source}/{printable(key)}"] = reason
    if self.corrupt <= _MAX_LOGGED or self.corrupt % _LOG_EVERY == 0:
      log.warning(
        f"Bad record {self.corrupt} of {self.read} read:"
        f" {describe_bad(source, key, reason)}"
      )

  def count_dropped(self, source: str, reason: str, count: int) -> None:
    """Counts dropped labels; logs the first and each tenfold increase."""
    name = f"{source}: {reason}"
    before = self.dropped[name]
    after = self.dropped[name] = before + count
    if not before or len(str(after)) > len(str(before)):
      log.warning(
        "Labels of %s (%d in %d records read)", name, after, self.read
      )

  def count_texts(
    self, texts: Mapping[str, int], *, ops: object, epoch: int
  ) -> None:
    """Adds the counts of texts; warns once if many are cut or unknown."""
    before = self.texts.copy()
    self.texts.update(texts)
    min_texts = min(_MIN_RECORDS, epoch)
    for kind, option in _LENGTH_OPTIONS.items():
      count = self.texts[kind]
      if not before[kind] < min_texts <= count:
        continue
      if (share := self.fraction("cut")[kind]) > _MAX_CUT:
        log.warning(
          "%.0f %% of %d %s have more tokens than %r allows and were cut."
          " Raise %s, or use a tokenizer with longer pieces.",
          *(100 * share, count, kind, ops, option),
        )
      if (share := self.fraction("unknown")[kind]) > _MAX_UNKNOWN:
        log.warning(
          "%.0f %% of %d %s have words that the tokenizer doesn't know; all get"
          " one id. Use another tokenizer, such as tokenizer=train:32000.",
          *(100 * share, count, kind),
        )

  def check_corrupt(self, max_corrupt: float, *, epoch: int) -> None:
    """Raises CorruptDataError if the share of bad records is too large."""
    if self.read < min(_MIN_RECORDS, epoch):
      return
    if self.corrupt > max_corrupt * self.read:
      reasons = [f"{key}: {reason}" for key, reason in self.reasons.items()]
      raise CorruptDataError(
        f"{self.corrupt} of {self.read} records read can't be used,"
        f" {self.corrupt / self.read:.2%}; data.max_corrupt allows"
        f" {max_corrupt:.2%}. Repair or remove them, or raise"
        " data.max_corrupt. Among them:\n  " + "\n  ".join(reasons[:10])
      )


def describe_bad(source: str, key: str, reason: str) -> str:
  """Describes a bad record for messages."""
  return f"{source}: record {printable(repr(key))}: {reason}"
