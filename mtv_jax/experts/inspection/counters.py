"""Streaming counts of 10^8 labels in bounded memory."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Real, UInt64

from mtv_jax.data.labels.label_sets import hash_key

_PHRASES = 200_000
# Hashes that estimate the number of distinct phrases: an error of 3 %.
_SKETCH = 1024
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Histogram:
  """Counts in fixed bins, with quantiles exact to the width of a bin.

  Count, mean, minimum and maximum are exact. Values outside the edges are
  counted too. `values` is "whole" if each bin is centred on one integer.
  """

  def __init__(
    self,
    edges: Float64[np.ndarray, " n"],
    *,
    values: Literal["real", "whole"] = "real",
  ):
    self.edges = edges
    self.values = values
    self.count, self.total = 0, 0.0
    self.min, self.max = np.inf, -np.inf
    # The first bin counts values below the edges, the last those above.
    self._counts = np.zeros(len(edges) + 1, np.int64)

  @classmethod
  def of_fractions(cls) -> Histogram:
    """Bins of 0.001 from 0 to 1."""
    return cls(np.linspace(0, 1, 1001))

  @classmethod
  def of_integers(cls, top: int) -> Histogram:
    """One bin for each integer from 0 to `top`."""
    return cls(np.arange(top + 2) - 0.5, values="whole")

  @classmethod
  def of_magnitudes(cls) -> Histogram:
    """Bins of 1.2 % from 1e-9 to 1e9, of either sign."""
    sizes = np.geomspace(1e-9, 1e9, 18 * 200 + 1)
    return cls(np.concatenate([-sizes[::-1], sizes]))

  def add(self, values: Real[np.ndarray, "..."]) -> None:
    """Counts the finite values."""
    values = values.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    bins = np.searchsorted(self.edges, values, side="right")
    # The last bin is closed at both ends.
    bins -= values == self.edges[-1]
    self._counts += np.bincount(bins, minlength=len(self._counts))
    self.count += values.size
    self.total += float(values.sum())
    self.min = float(values.min(initial=self.min))
    self.max = float(values.max(initial=self.max))

  def fraction(self, value: float | int) -> float | None:
    """Fraction of values in the bin of `value`; None if there are none."""
    index = int(np.searchsorted(self.edges, value, side="right"))
    return int(self._counts[index]) / self.count if self.count else None

  def quantile(self, q: float | int) -> float | None:
    """The q-quantile, interpolated within its bin; None if it has no values."""
    if not self.count:
      return None
    rank, ends = q * self.count, np.cumsum(self._counts)
    index = int(np.searchsorted(ends, max(rank, 1e-9), side="left"))
    low = self.edges[index - 1] if index else self.min
    high = self.edges[index] if index < len(self.edges) else self.max
    if self.values == "whole" and 0 < index < len(self.edges):
      return float(round((low + high) / 2))
    start = ends[index] - self._counts[index]
    value = np.interp(rank, (start, ends[index]), (low, high))
    return float(np.clip(value, self.min, self.max))

  def bars(self) -> dict[str, list]:
    """At most about 20 bars for a chart, as `edges` and `counts`.

    Neighbouring bins are merged, from the first non-empty bin to the last (all
    of them for fractions). Values outside the edges have separate bars.
    """
    inner, edges = self._counts[1:-1], self.edges
    filled = np.flatnonzero(inner)
    first, last = (filled[0], filled[-1] + 1) if filled.size else (0, 0)
    most = 20
    if self.values == "whole":
      first, most = 0, 32
    elif (edges[0], edges[-1]) == (0, 1) and filled.size:
      first, last = 0, len(inner)
    starts = np.arange(first, last, max(-(-(last - first) // most), 1))
    counts, bar_edges = [], []
    if starts.size:
      counts = np.add.reduceat(inner[:last], starts).tolist()
      bar_edges = edges[[*starts, last]].tolist()
    if below := int(self._counts[0]):
      bar_edges = [self.min, *(bar_edges or [float(edges[0])])]
      counts = [below, *counts]
    if above := int(self._counts[-1]):
      bar_edges = [*(bar_edges or [float(edges[-1])]), self.max]
      counts = [*counts, above]
    return {"edges": bar_edges, "counts": counts}

  def to_dict(self) -> dict[str, Any]:
    """JSON fields of the histogram."""
    if not self.count:
      return {"count": 0}
    return {
      "count": self.count,
      "mean": self.total / self.count,
      "min": self.min,
      "max": self.max,
      "quantiles": {f"{q:g}": self.quantile(q) for q in _QUANTILES},
      "values": self.values,
      "bars": self.bars(),
    }


class PhraseCounts:
  """Frequencies of phrases, of which any number may be distinct.

  Exact up to `2 * limit` distinct phrases. Beyond, rare phrases are dropped and
  the other counts lowered (Misra and Gries 1982, merged as in Agarwal et al.
  2012, Mergeable Summaries): a count is too low by at most `short_by`, and a
  dropped phrase occurred at most that often. The number of distinct phrases is
  then estimated from their smallest hashes (Bar-Yossef et al. 2002, Counting
  Distinct Elements in a Data Stream).
  """

  def __init__(self, *, limit: int = _PHRASES):
    self.short_by = 0
    self._limit = limit
    self._counts: collections.Counter[str] = collections.Counter()
    self._hashes = np.zeros(0, np.uint64)

  def add(self, phrases: Iterable[str]) -> None:
    """Counts phrases."""
    self._counts.update(phrases)
    if len(self._counts) > 2 * self._limit:
      self._hashes = self._smallest_hashes()
      floor = heapq.nlargest(self._limit + 1, self._counts.values())[-1]
      self._counts = collections.Counter(
        {p: n - floor for p, n in self._counts.items() if n > floor}
      )
      self.short_by += floor

  def _smallest_hashes(self) -> UInt64[np.ndarray, " n"]:
    hashes = np.fromiter(map(hash_key, self._counts), np.uint64)
    return np.unique(np.concatenate([self._hashes, hashes]))[:_SKETCH]

  @property
  def distinct(self) -> int:
    """How many phrases are distinct; an estimate unless `short_by` is 0."""
    if not self.short_by:
      return len(self._counts)
    hashes = self._smallest_hashes()
    if len(hashes) < _SKETCH:
      return len(hashes)
    return round((_SKETCH - 1) / (float(hashes[-1]) / 2**64))

  def most_common(self, n: int) -> list[tuple[str, int]]:
    """The n most frequent phrases; ties in the order of spelling."""
    items = self._counts.items()
    return heapq.nsmallest(n, items, key=lambda item: (-item[1], item[0]))
