"""Tables of contrasts: differences with intervals, p values and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtv_jax.report.contrasts import (
  DISTINCT,
  MISSING,
  Comparison,
  Contrast,
  Metric,
)
from mtv_jax.report.page import Bold, Details, PageBlock, Table
from mtv_jax.utils.text import format_metric

EMPTY = "–"


def format_value(value: float, metric: Metric, *, signed: bool = False) -> str:
  """A value in the metric's displayed unit, without the unit."""
  return format_metric(
    metric.scale * value, metric.unit, digits=1, signed=signed
  )


def format_ends(
  low: float | None, high: float | None, metric: Metric, *, signed: bool = True
) -> str:
  """An interval as `low, high`; "" if unknown."""
  if low is None or high is None:
    return ""
  return ", ".join(format_value(v, metric, signed=signed) for v in (low, high))


def format_difference(c: Contrast, *, seeds: bool = True) -> str:
  """Difference and interval, over seeds if `seeds` and known, else items."""
  ends = format_ends(c.low, c.high, c.metric) if seeds else ""
  ends = ends or format_ends(c.item_low, c.item_high, c.metric)
  text = format_value(c.difference, c.metric, signed=True)
  return f"{text} [{ends}]" if ends else text


def describe_differences(compared: Sequence[Comparison]) -> Iterator[PageBlock]:
  """A table of differences with verdicts, then their details."""
  yield Table(differences_table(compared))
  yield list_contrasts([(c.name, c) for c in compared])


def differences_table(compared: Sequence[Comparison]) -> list[list[str]]:
  """Differences, intervals and verdicts: a header, then a row per metric."""
  before = {c.arm: c.baseline for c in compared}
  several = len({*before.values()}) > 1
  rows: dict[Metric, list[str]] = {}
  for c in compared:
    text = MISSING
    if c.difference is not None:
      text = f"{format_difference(c)}\n{c.verdict}"
    row = rows.setdefault(c.metric, [c.metric.label])
    row.append(Bold(text) if c.verdict in DISTINCT else text)
  head = [f"{a} − {before[a]}" if several else a for a in before]
  return [["metric", *head], *rows.values()]


def list_contrasts(
  rows: Sequence[tuple[str, Contrast]], columns: Sequence[str] = ()
) -> PageBlock:
  """A collapsed `contrast_table`, limited to `columns` if given."""
  head, *lines = contrast_table(rows)
  kept = [k for k, name in enumerate(head) if name in (columns or head)]
  table = Table([[line[k] for k in kept] for line in (head, *lines)])
  return Details("Intervals and p values", [table])


def contrast_table(rows: Sequence[tuple[str, Contrast]]) -> list[list[str]]:
  """All fields of contrasts: a header, then a row per contrast."""
  head = ["comparison", "metric", "difference", "seeds 95 %", "items 95 %"]
  table = [[*head, "p", "p Holm", "n", "test", "verdict", "note"]]
  for name, c in rows:
    difference = EMPTY
    if c.difference is not None:
      difference = format_value(c.difference, c.metric, signed=True)
    table.append(
      [
        name,
        c.metric.label,
        difference,
        format_ends(c.low, c.high, c.metric) or EMPTY,
        format_ends(c.item_low, c.item_high, c.metric) or EMPTY,
        *(EMPTY if p is None else f"{p:.2g}" for p in (c.p, c.p_holm)),
        str(c.n),
        c.test or EMPTY,
        c.verdict,
        c.note,
      ]
    )
  return table
