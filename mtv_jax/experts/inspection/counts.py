"""Counts of what a hundred million labels hold, in memory that stays small."""

from __future__ import annotations

import collections
import hashlib
import heapq
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float64, Real, UInt64

# Phrases that are counted one by one at least; twice as many at most are held.
PHRASES = 200_000
# Of the hashes by which distinct phrases are estimated: 3 % of error.
_SKETCH = 1024


class Histogram:
  """Counts of a quantity in bins; its quantiles without keeping its values.

  A quantile is exact to the width of its bin; count, mean, least and greatest
  are exact.

  Args:
    edges: of the bins, increasing. Values beyond them are counted too.
    values: "real", or "whole" where each bin holds one whole number, its
      centre.
  """

  def __init__(self, edges: Float64[np.ndarray, "n"], *, values: str = "real"):
    if values not in ("real", "whole"):
      raise ValueError(f"values={values!r}; they are 'real' or 'whole'.")
    self.edges = edges
    self.values = values
    self.count = 0
    self.total = 0.0
    self.least = np.inf
    self.greatest = -np.inf
    # The first is of what lies below the edges, the last of what lies above.
    self._counts = np.zeros(len(edges) + 1, np.int64)

  @classmethod
  def of_shares(cls) -> Histogram:
    """From 0 to 1, to a thousandth."""
    return cls(np.linspace(0, 1, 1001))

  @classmethod
  def of_whole_numbers(cls, top: int) -> Histogram:
    """From 0 to `top`, each alone."""
    return cls(np.arange(top + 2) - 0.5, values="whole")

  @classmethod
  def of_magnitudes(cls) -> Histogram:
    """Of either sign, from 1e-9 to 1e9, to 1.2 %."""
    sizes = np.geomspace(1e-9, 1e9, 18 * 200 + 1)
    return cls(np.concatenate([-sizes[::-1], sizes]))

  def add(self, values: Real[np.ndarray, "..."]) -> None:
    """Counts values, those that are NaN or infinite left out."""
    values = values.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
      return
    places = np.searchsorted(self.edges, values, side="right")
    # The last bin has both of its edges.
    places -= values == self.edges[-1]
    self._counts += np.bincount(places, minlength=len(self._counts))
    self.count += values.size
    self.total += float(values.sum())
    self.least = min(self.least, float(values.min()))
    self.greatest = max(self.greatest, float(values.max()))

  @property
  def mean(self) -> float | None:
    """None without any value."""
    return self.total / self.count if self.count else None

  def share_of(self, value: float | int) -> float | None:
    """How much of all is in the bin of a value; None without any."""
    place = int(np.searchsorted(self.edges, value, side="right"))
    return int(self._counts[place]) / self.count if self.count else None

  def quantile(self, share: float | int) -> float | None:
    """The value that this share of all is not above; None without any."""
    if not self.count:
      return None
    wanted, ends = share * self.count, np.cumsum(self._counts)
    place = int(np.searchsorted(ends, max(wanted, 1e-9), side="left"))
    low = self.edges[place - 1] if place else self.least
    high = self.edges[place] if place < len(self.edges) else self.greatest
    if self.values == "whole" and 0 < place < len(self.edges):
      return float(round((low + high) / 2))
    within = self._counts[place]
    part = (wanted - (ends[place] - within)) / within
    value = low + min(max(part, 0.0), 1.0) * (high - low)
    return float(min(max(value, self.least), self.greatest))

  def bars(self) -> dict[str, list]:
    """Neighbouring bins together, `edges` and `counts`, for a drawing.

    From the first bin that holds something to the last; all between 0 and 1
    for shares. What lies beyond the edges is in a bar of its own.
    """
    inner, edges = self._counts[1:-1], self.edges
    filled = np.flatnonzero(inner)
    first, last = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    if self.values == "whole":
      first = 0
    elif (edges[0], edges[-1]) == (0, 1) and filled.size:
      first, last = 0, len(inner)
    most = 32 if self.values == "whole" else 20
    together = max(-(-(last - first) // most), 1)
    starts = np.arange(first, last, together)
    counts = [int(inner[s : min(s + together, last)].sum()) for s in starts]
    shown = [float(edges[s]) for s in starts]
    if len(starts):
      shown.append(float(edges[last]))
    if below := int(self._counts[0]):
      shown = [self.least, *(shown or [float(edges[0])])]
      counts = [below, *counts]
    if above := int(self._counts[-1]):
      shown = [*(shown or [float(edges[-1])]), self.greatest]
      counts = [*counts, above]
    return {"edges": shown, "counts": counts}

  def to_dict(self) -> dict[str, Any]:
    """For JSON."""
    if not self.count:
      return {"count": 0}
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    return {
      "count": self.count,
      "mean": self.mean,
      "min": self.least,
      "max": self.greatest,
      "quantiles": {f"{share:g}": self.quantile(share) for share in shares},
      "values": self.values,
      "bars": self.bars(),
    }


class PhraseCounts:
  """How often each phrase is there, of any number of different ones.

  Exact as long as no more than twice `limit` are different. After that the
  rarest are forgotten and the others' counts lowered (Misra and Gries, merged
  as Agarwal et al., Mergeable Summaries, do): a count is short by at most
  `short_by`, and a phrase that is not listed was there that often at most. The
  number of different ones is then estimated from the least of their hashes
  (Bar-Yossef et al., Counting Distinct Elements in a Data Stream).
  """

  def __init__(self, *, limit: int = PHRASES):
    self.short_by = 0
    self._limit = limit
    self._counts: collections.Counter[str] = collections.Counter()
    self._least = np.zeros(0, np.uint64)

  def add(self, phrases: Iterable[str]) -> None:
    """Counts phrases."""
    self._counts.update(phrases)
    if len(self._counts) > 2 * self._limit:
      self._forget()

  def _forget(self) -> None:
    self._least = self._sketch()
    kept = heapq.nlargest(self._limit + 1, self._counts.values())[-1]
    self._counts = collections.Counter(
      {p: n - kept for p, n in self._counts.items() if n > kept}
    )
    self.short_by += kept

  def _sketch(self) -> UInt64[np.ndarray, "n"]:
    """The least hashes of all phrases so far."""
    hashes = np.fromiter(map(_hash, self._counts), np.uint64)
    return np.unique(np.concatenate([self._least, hashes]))[:_SKETCH]

  @property
  def distinct(self) -> int:
    """How many are different; an estimate where `short_by` is not 0."""
    if not self.short_by:
      return len(self._counts)
    least = self._sketch()
    if len(least) < _SKETCH:
      return len(least)
    return round((_SKETCH - 1) / (float(least[-1]) / 2**64))

  def most_common(self, n: int) -> list[tuple[str, int]]:
    """The most frequent first, equally frequent ones by spelling."""
    items = self._counts.items()
    return heapq.nsmallest(n, items, key=lambda item: (-item[1], item[0]))


def _hash(phrase: str) -> int:
  digest = hashlib.blake2b(phrase.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")
