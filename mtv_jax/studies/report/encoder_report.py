"""Report of several encoders under the same evaluations.

The page of `evals/report`, with a row for each protocol, and the differences
from one of the encoders: paired by item where the results have resamples of the
items.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Sequence

from mtv_jax.evals.core import results
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.report import report as report_lib
from mtv_jax.evals.report import sections, tables
from mtv_jax.studies import statistics
from mtv_jax.studies.contrasts import Metric
from mtv_jax.studies.report import study_figures
from mtv_jax.studies.results import collect_measurements, describe_metrics
from mtv_jax.studies.statistics import Comparison
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.pages import Block, write_pages

_NOTE = (
  "Differences in the metric's unit with 95 % intervals over the items of the "
  "test set, as the encoders stand: other seeds of a training are not in them. "
  "A difference is better or worse if the interval excludes 0 and its p value, "
  "corrected for all comparisons of the table (Holm 1979), is below 0.05; it "
  "is missing where an encoder has no result by the other one's protocol. "
)
_PAIRED = "All are paired: both encoders' metrics on the same resamples."
_UNPAIRED = (
  "Not paired, from the standard errors of both, which is wider: {}. The "
  "others are of both encoders' metrics on the same resamples."
)
# Of `study_figures.contrast_table`: without what concerns seeds.
_COLUMNS = (
  "comparison",
  "metric",
  "difference",
  "items 95 %",
  "p",
  "p Holm",
  "verdict",
)


def write_encoders(
  outcomes: Sequence[Outcome],
  output: str | os.PathLike,
  *,
  baseline: str,
  size: str | None = "base",
) -> list[pathlib.Path]:
  """Writes the report of encoders; returns its files.

  Args:
    outcomes: one per encoder, with different names.
    output: folder of `report.html`, `report.md`, `results.json` and images.
    baseline: the encoder that the others are compared with.
    size: model size of the charted published encoders; None for none.

  Raises:
    ConfigError: there is no encoder of the baseline's name.
  """
  output = pathlib.Path(output)
  check_baseline(baseline, [outcome.name for outcome in outcomes])
  report = report_lib.build_report(outcomes, size=size, split=True)
  further = [*_describe_differences(outcomes, baseline)]
  results.write(output / "results.json", outcomes)
  title = "Comparison of " + ", ".join(outcome.name for outcome in outcomes)
  blocks = sections.describe_report(report, further=further)
  return [*write_pages(title, blocks, output), output / "results.json"]


def check_baseline(baseline: str, names: Sequence[str]) -> None:
  """Raises ConfigError if no encoder has the baseline's name."""
  if baseline not in names:
    raise ConfigError(
      f"--baseline={baseline}: no encoder has this name. "
      f"{did_you_mean(baseline, names)}"
    )


def compare_encoders(
  outcomes: Sequence[Outcome], baseline: str
) -> tuple[list[Comparison], list[Metric]]:
  """The main metrics, and each encoder's differences from the baseline's.

  Results of other protocols or data than the baseline's are missing.
  """
  by_name = {outcome.name: outcome for outcome in outcomes}
  reference = by_name[baseline]
  metrics = [
    metric
    for name, result in reference.results.items()
    for metric in describe_metrics(name, result)
  ]
  main = study_figures.select_main(metrics)
  keys = {k: tables.protocol_key(r) for k, r in reference.results.items()}
  data = collect_measurements(
    {
      outcome.name: {
        0: {
          name: result
          for name, result in outcome.results.items()
          if keys.get(name) == tables.protocol_key(result)
        }
      }
      for outcome in outcomes
    }
  )
  return statistics.compare(data, main, baseline=baseline), main


def _describe_differences(
  outcomes: Sequence[Outcome], baseline: str
) -> Iterator[Block]:
  if len(outcomes) < 2:
    return
  compared, metrics = compare_encoders(outcomes, baseline)
  if not any(c.difference is not None for c in compared):
    return
  yield Block("heading", f"Differences from {baseline}")
  table = study_figures.differences_table(compared, metrics)
  yield Block("table", table)
  unpaired = [f"{c.arm}, {c.metric}" for c in compared if c.items == "errors"]
  how = _UNPAIRED.format("; ".join(unpaired)) if unpaired else _PAIRED
  yield Block("note", _NOTE + how)
  by_name = {metric.name: metric for metric in metrics}
  rows = [
    (f"{c.arm} − {c.baseline}", by_name[c.metric], c)
    for c in compared
    if c.difference is not None
  ]
  whole = study_figures.contrast_table(rows)
  chosen = [whole[0].index(column) for column in _COLUMNS]
  table = [[line[k] for k in chosen] for line in whole]
  inner = (Block("table", table),)
  yield Block("details", "Intervals and p values", inner=inner)
