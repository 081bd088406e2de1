"""Writes tables and charts of docs/study from its table of runs.

  python tools/study_pages.py [PAGE ...] [--check]
  python tools/study_pages.py --add=studies/terms --without base

A comment above a table names the study and what its columns have, the first one
apart:

  <!-- controls: vl | depth: interval | depth - vl | depth - vl: p -->

A column is an arm's mean, or its `interval` or correlation with a rank, or a
difference between arms in one of `FORMS`; STUDY/ARM reads it from another
study, and `=` leaves its cells. Rows are metrics; those without a slash stay.
With `STUDY, by arm` rows are arms, columns metrics or `flops`; the rows of
`BASELINES` stay. `<!-- STUDY: predictions -->` writes the whole table, and
`<!-- charts: STUDY ... -->` draws the images after it from the studies' report.
`--check` writes nothing and fails if a table or a chart differs.

`--add` puts a study's finished runs into docs/study/runs.parquet, instead of
those it has of a study of this name. A row is a metric of a run: its value, the
standard error over the test items, a digest of the protocol, and for main
metrics the values on resamples of the items, as uint16: `low + step * code`,
65535 for NaN. Training losses (`type` "training") are means of the last tenth.
The schema's metadata have the plans of the studies.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtv_jax.report import charts
from mtv_jax.report.charts import Chart
from mtv_jax.report.contrasts import (
  ArmMeasurements,
  Comparison,
  Contrast,
  Metric,
)
from mtv_jax.report.page import PageFiles, Table
from mtv_jax.report.run_folders import group_by_arm
from mtv_jax.report.tables import EMPTY, format_difference, format_p
from mtv_jax.studies import budgets, page, statistics
from mtv_jax.studies.expand import ComparisonFamily, Study, StudyRun
from mtv_jax.studies.statistics import StudyResults
from mtv_jax.utils.errors import UserError, check_choice

DOCS = pathlib.Path(__file__).parents[1] / "docs/study"
RUNS = DOCS / "runs.parquet"
# Arms whose runs are of other studies, as STUDY or STUDY/ARM.
SHARED: Mapping[str, Mapping[str, str]] = {
  "captions": {"vl_classes": "ssl_setting"},
  "controls": {"vl": "ladder"},
  "controls_photos": {"vl": "photos"},
  "flops": {"depth": "ladder"},
  "flops_photos": {"grounding": "photos"},
  "mae_weight": {"vl": "ladder"},
  "mae_weight_all": {"depth": "ladder"},
  "photos_long": {"vl": "flops_photos"},
  "photos_seeds": {"vl": "photos", "grounding": "photos"},
  "shared_crop": {"base": "ladder/depth"},
  "ssl": {"vl": "ladder", "vl+mae": "ssl_parts", "vl+dino_ibot": "ssl_parts"},
  "ssl_flops": {"all": "ladder/depth"},
  "ssl_parts": {"vl": "ladder"},
  "terms": {"base": "ladder/depth"},
}
# Rows that are no runs.
BASELINES = ("untrained", "raw pixels")
RANKS = ("feature_rank/rankme", "feature_rank/lidar")
# Evaluations whose further metrics have intervals over items, too.
FURTHER = ("few_shot", "vqa")
_NAN = 65535  # Of resamples.
TRAINING = "training"  # Type of losses.
_COLUMNS = {
  "study": pa.string(),
  "arm": pa.string(),
  "seed": pa.int16(),
  "metric": pa.string(),
  "value": pa.float64(),
  "error": pa.float64(),
  "unit": pa.string(),
  "lower": pa.bool_(),
  "chance": pa.float64(),
  "type": pa.string(),
  "main": pa.bool_(),
  "protocol": pa.string(),
  "low": pa.float64(),
  "step": pa.float64(),
  "resamples": pa.binary(),
}
COMMENT = re.compile(r"<!-- (?!charts)([\w.]+)(, by arm)?: (.+) -->")


# Of a difference, after a colon; also `power`.
FORMS: Mapping[str, Callable[[Contrast], str]] = {
  "": format_difference,
  "p": lambda c: format_p(c.p),
  "p Holm": lambda c: format_p(c.p_holm),
  "p / Holm": lambda c: f"{format_p(c.p)} / {format_p(c.p_holm)}",
  "verdict": lambda c: c.verdict,
  "with verdict": lambda c: f"{format_difference(c)} {c.verdict}",
  "seeds": lambda c: str(c.n),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("pages", nargs="*", help="names; default: all pages")
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--add", type=pathlib.Path, help="a study's folder")
  parser.add_argument("--without", nargs="+", default=(), help="arms or runs")
  args = parser.parse_args()
  if args.add:
    return add_study(RUNS, args.add, args.without)
  paths = {path.name: path for path in sorted(DOCS.glob("*.md"))}
  for name in args.pages:
    check_choice("PAGE", name, paths)
  studies, differs = Studies(), False
  for path in [paths[name] for name in args.pages or paths]:
    text = path.read_text()
    tables = "\n".join(write_tables(text.split("\n"), studies))
    for file, new in {path: tables, **draw_charts(text, studies)}.items():
      old = file.read_text() if file.exists() else ""
      for line in difflib.unified_diff(
        old.splitlines(), new.splitlines(), file.name, lineterm="", n=0
      ):
        print(line)
        differs = True
      if not args.check:
        file.parent.mkdir(exist_ok=True)
        file.write_text(new)
  sys.exit(args.check and differs)


class Studies:
  """Results of the studies of a table of runs."""

  def __init__(self, path: pathlib.Path = RUNS):
    table = pq.read_table(path)
    self._plans = json.loads(table.schema.metadata[b"studies"])
    self._rows: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
      run = row["study"], row["arm"], row["seed"]
      self._rows.setdefault(run, []).append(row)

  @functools.cache  # noqa: B019
  def read(self, name: str) -> StudyResults:
    """Results of a study, with the runs that it shares with others."""
    check_choice("a study", name, self._plans)
    study, predictions = _decode_plan(self._plans[name])
    arms = dict.fromkeys(run.arm for run in study.runs)
    fields = ("values", "errors", "resamples", "protocols", "losses")
    read = {field: {arm: {} for arm in arms} for field in fields}
    metrics, unfinished = {}, []
    for run in study.runs:
      other, _, arm = SHARED.get(name, {}).get(run.arm, name).partition("/")
      rows = self._rows.get((name, run.arm, run.seed))
      rows = rows or self._rows.get((other, arm or run.arm, run.seed))
      if not rows:
        unfinished.append(run.name)
        continue
      for field, values in _decode_run(rows, metrics).items():
        read[field][run.arm][run.seed] = values
    losses = read.pop("losses")
    return StudyResults(
      study,
      (),
      ArmMeasurements(**read),
      tuple(metrics.values()),
      tuple(unfinished),
      losses,
      predictions,
    )

  @functools.cache  # noqa: B019
  def tests(self, study: str) -> statistics.Tests:
    """The tests of a study's family."""
    return statistics.run_tests(self.read(study))


def add_study(
  path: pathlib.Path, folder: pathlib.Path, without: Collection[str] = ()
) -> None:
  """Adds the plan and the finished runs of a study's folder to the table."""
  results, name = statistics.read_study(folder), folder.resolve().name
  plans, rows = {}, []
  if path.exists():
    table = pq.read_table(path)
    plans = json.loads(table.schema.metadata[b"studies"])
    rows = [row for row in table.to_pylist() if row["study"] != name]
  plans[name] = _encode_plan(results)
  for run in results.runs:
    if not {run.arm, run.name} & {*without}:
      rows += _encode_run(results, name, run.arm, run.seed)
  metadata = {"studies": json.dumps(plans, separators=(",", ":"))}
  schema = pa.schema([*_COLUMNS.items()], metadata=metadata)
  options = dict(compression="zstd", compression_level=19)
  dictionary = [name for name in _COLUMNS if name != "resamples"]
  table = pa.Table.from_pylist(rows, schema)
  pq.write_table(table, path, use_dictionary=dictionary, **options)


def _encode_plan(results: StudyResults) -> dict[str, Any]:
  """The plan as JSON; the runs of an arm have equal steps and FLOPs."""
  names = ("kind", "config", "baseline", "match", "budget")
  arms = {
    arm: ([run.seed for run in runs], runs[0].steps, runs[0].flops)
    for arm, runs in group_by_arm(results.study.runs).items()
  }
  return dict(
    {name: getattr(results.study, name) for name in names},
    arms=arms,
    family=dataclasses.asdict(results.family),
    predictions=results.predictions,
  )


def _decode_plan(fields: Mapping[str, Any]) -> tuple[Study, dict[str, Any]]:
  fields = dict(fields)
  predictions = fields.pop("predictions")
  family = ComparisonFamily.from_dict(fields.pop("family"))
  runs = tuple(
    StudyRun(f"{arm}-s{seed}", arm, seed, (), steps, {}, flops)
    for arm, (seeds, steps, flops) in fields.pop("arms").items()
    for seed in seeds
  )
  return Study(**fields, runs=runs, family=family), predictions


def _encode_run(
  results: StudyResults, study: str, arm: str, seed: int
) -> Iterator[dict[str, Any]]:
  """The rows of a run."""
  main, data = {*results.main}, results.measurements
  values, errors, resamples, protocols = (
    getattr(data, field)[arm][seed]
    for field in ("values", "errors", "resamples", "protocols")
  )
  common = dict(study=study, arm=arm, seed=seed)
  for metric in results.metrics:
    name, row = metric.name, {**common, **vars(metric), "metric": metric.name}
    if name not in values:
      continue
    row["main"] = metric in main
    row |= dict(value=values[name], error=errors.get(name))
    digest = hashlib.blake2b(protocols[name].encode(), digest_size=6)
    row["protocol"] = digest.hexdigest()
    has_interval = row["main"] or name.partition("/")[0] in FURTHER
    if has_interval and name in resamples:
      row |= _encode_resamples(resamples[name])
    yield {key: value for key, value in row.items() if key in _COLUMNS}
  for name, loss in results.losses[arm][seed].items():
    yield {**common, "metric": name, "value": loss, "type": TRAINING}


def _decode_run(
  rows: list[dict[str, Any]], metrics: dict[str, Metric]
) -> dict[str, dict[str, Any]]:
  """A run's values by field and metric; adds to the metrics."""
  fields = ("values", "errors", "resamples", "protocols", "losses")
  read = {field: {} for field in fields}
  for row in rows:
    name = row["metric"]
    if row["type"] == TRAINING:
      read["losses"][name] = row["value"]
      continue
    names = ("unit", "lower", "chance", "type")
    options = {key: row[key] for key in names}
    metrics.setdefault(name, Metric(name, **options, is_main=row["main"]))
    read["values"][name] = row["value"]
    read["protocols"][name] = row["protocol"]
    if row["error"] is not None:
      read["errors"][name] = row["error"]
    if row["resamples"] is not None:
      codes = np.frombuffer(row["resamples"], "<u2")
      values = row["low"] + row["step"] * codes
      read["resamples"][name] = np.where(codes == _NAN, np.nan, values)
  return read


def _encode_resamples(values: np.ndarray) -> dict[str, Any]:
  """Codes of values; exact for multiples of a step, such as accuracies."""
  is_known = np.isfinite(values)
  levels = np.unique(values[is_known])
  low, span = levels[0], levels[-1] - levels[0]
  step = span / (_NAN - 1) or 1.0
  if len(levels) > 1:
    counts = (levels - low) / np.diff(levels).min()
    if counts[-1] < _NAN and np.allclose(counts, counts.round(), atol=1e-3):
      step = span / counts[-1].round()
  codes = np.where(is_known, np.round((values - low) / step), _NAN)
  codes = codes.astype("<u2").tobytes()
  return dict(low=low, step=step, resamples=codes)


def write_tables(lines: list[str], studies: Studies) -> Iterator[str]:
  """Lines of a page with the cells of its tables."""
  rows = iter(lines)
  for line in rows:
    yield line
    if (comment := COMMENT.fullmatch(line)) is None:
      continue
    study, by_arm, columns = comment.groups()
    table = [*iter(lambda: next(rows, ""), "")]  # Up to an empty line.
    if columns == "predictions":
      predictions = page.predictions_table(studies.read(study))
      dateless = [[*row[:5], *row[6:]] for row in predictions]
      yield from Table(dateless, numbers=2).markdown(PageFiles()).split("\n")
    else:
      specs = columns.split(" | ")
      yield from table[:2]
      for row in table[2:]:
        name, *cells = map(str.strip, row.split("|")[1:-1])
        if by_arm:
          cells = _cells_by_arm(name, cells, specs, studies.read(study))
        elif "/" in name:
          cells = [
            cell if spec == "=" else _cell(name, spec, study, studies)
            for spec, cell in zip(specs, cells, strict=True)
          ]
        yield f"| {' | '.join([name, *cells])} |"
    yield ""


def draw_charts(text: str, studies: Studies) -> dict[pathlib.Path, str]:
  """SVG of the images of a page that follow a comment `charts: STUDY ...`."""
  files = {}
  for block in re.finditer(r"<!-- charts: (.+) -->\n((?:!\[.+\n)+)", text):
    names = block[1].split()
    if len(names) > 1:
      drawn = budgets.draw_budgets([studies.read(name) for name in names])
    else:
      drawn = _draw_arms(studies, *names)
    by_name = {chart.name: chart for chart in drawn}
    for image in re.findall(r"\((.+\.svg)\)", block[2]):
      path = DOCS / image
      files[path] = charts.to_file(by_name[path.stem])
  return files


def _draw_arms(studies: Studies, name: str) -> list[Chart]:
  """The charts of the arms, as the study's report has them."""
  results, tests = studies.read(name), studies.tests(name)
  data, baseline = results.measurements, results.study.baseline
  pairs = [(arm, baseline) for arm in data.values if arm != baseline]
  compared = statistics.compare(data, results.main, pairs, tests)
  return page.draw_arms(data, results.main, compared)


def _cell(label: str, spec: str, study: str, studies: Studies) -> str:
  """A metric's cell of a column."""
  column, _, form = spec.partition(": ")
  other, _, arms = column.rpartition("/")
  study = other or study
  results = studies.read(study)
  metric = _find_metric(results, label.partition(" ")[0])
  arm, _, baseline = arms.partition(" - ")
  if not baseline:
    return _arm_cell(results, metric, arm, form)
  pair, tests = (arm, baseline), studies.tests(study)
  check_choice(f"the form of {spec!r}", form, (*FORMS, "power"))
  for name in pair:
    check_choice("an arm", name, results.measurements.values)
  [c] = statistics.compare(results.measurements, [metric], [pair], tests)
  if form == "power":
    return _power_cell(results, c)
  is_absent = c.difference is None and form != "verdict"
  return EMPTY if is_absent else FORMS[form](c)


def _arm_cell(
  results: StudyResults, metric: Metric, arm: str, form: str
) -> str:
  """An arm's mean, its interval, or a correlation with a rank over its runs."""
  data = results.measurements
  check_choice(f"the form of {arm!r}", form, ("", "interval", *RANKS))
  if arm != "chance" and not (arm == "all" and form in RANKS):
    check_choice("an arm", arm, data.values)
  if form in RANKS:
    values = data.values if arm == "all" else {arm: data.values[arm]}
    runs = dataclasses.replace(data, values=values)
    rank = _find_metric(results, form)
    correlations = statistics.correlate_ranks(runs, [metric, rank])
    return f"{correlations[metric, rank][0]:+.2f}".replace("-", "−")
  if arm == "chance":
    return page.format_chance(metric)
  row = statistics.summarise_arm(data, metric, arm)
  if form != "interval":
    row = row._replace(low=None)
  # Ranks are written with one decimal, as percentages are.
  return page.format_mean(row, "%" if metric.name in RANKS else metric.unit)


def _power_cell(results: StudyResults, c: Comparison) -> str:
  """Seeds of each arm for 80 % power at Holm's first step."""
  header, *rows = statistics.power_table(results)[0]
  column = header.index("in the family")
  counts = {(row[0], row[1]): row[column] for row in rows}
  return counts.get((c.name, c.metric.label), EMPTY)


def _cells_by_arm(
  arm: str, cells: list[str], specs: list[str], results: StudyResults
) -> list[str]:
  """An arm's cells; unchanged for baselines."""
  if arm in BASELINES:
    return cells
  check_choice("an arm", arm, results.measurements.values)
  runs = [run for run in results.study.runs if run.arm == arm]
  return [
    f"{runs[0].flops / 1e12:.2f}"
    if spec == "flops"
    else _arm_cell(results, _find_metric(results, spec), arm, "")
    for spec in specs
  ]


def _find_metric(results: StudyResults, name: str) -> Metric:
  metrics = {metric.name: metric for metric in results.metrics}
  check_choice("a metric", name, metrics)
  return metrics[name]


if __name__ == "__main__":
  try:
    main()
  except UserError as error:
    sys.exit(f"study_pages: {error}")
