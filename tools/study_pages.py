"""Writes tables and charts of docs/study from the archives of its runs.

  python tools/study_pages.py [PAGE ...] [--check]
  python tools/study_pages.py --pack=studies/terms --without base

A comment above a table names the study and what its columns have, the first one
apart:

  <!-- controls: vl | depth: interval | depth - vl | depth - vl: p -->

A column is an arm's mean, or its `interval` or correlation with a rank, or a
difference between arms in one of `FORMS`; STUDY/ARM reads it from another
study, and `=` leaves its cells. Rows are metrics; those without a slash stay.
With `STUDY, by arm` rows are arms, columns metrics or `flops`; the rows of
`BASELINES` stay. `<!-- STUDY: predictions -->` writes the whole table, and
`<!-- charts: STUDY ... -->` draws the images after it from the studies' report.
`--check` fails if a table differs, and draws nothing.
`--pack` writes the archive of a study's finished runs, without checkpoints.
"""

import argparse
import dataclasses
import difflib
import functools
import pathlib
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping

from mtv_jax.report.contrasts import Comparison, Contrast, Metric
from mtv_jax.report.page import PageFiles, Table
from mtv_jax.report.tables import EMPTY, format_difference, format_p
from mtv_jax.studies import budgets, page, runner, statistics
from mtv_jax.studies.statistics import StudyResults
from mtv_jax.utils.errors import UserError, check_choice

DOCS = pathlib.Path(__file__).parents[1] / "docs/study"
# Arms whose runs are in other archives, as STUDY or STUDY/ARM.
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
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("pages", nargs="*", help="names; default: all pages")
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--pack", type=pathlib.Path, help="a study's folder")
  parser.add_argument("--without", nargs="+", default=(), help="arms or runs")
  args = parser.parse_args()
  if args.pack:
    return print(f"wrote {pack(args.pack, args.without)}")
  paths = {path.name: path for path in sorted(DOCS.glob("*.md"))}
  for name in args.pages:
    check_choice("PAGE", name, paths)
  pages = [paths[name] for name in args.pages or paths]
  differs = False
  with tempfile.TemporaryDirectory() as folder:
    studies = Studies(pathlib.Path(folder))
    for path in pages:
      text = path.read_text()
      written = "\n".join(write_tables(text.split("\n"), studies))
      lines = difflib.unified_diff(
        text.splitlines(), written.splitlines(), path.name, lineterm="", n=0
      )
      for line in lines:
        print(line)
        differs = True
      if not args.check:
        path.write_text(written)
        draw_charts(text, studies)
  sys.exit(args.check and differs)


class Studies:
  """Results of the archived studies, unpacked into a folder when read."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._archives = {}
    for archive in DOCS.glob("*/*.tar.xz"):
      with tarfile.open(archive) as tar:
        self._archives[tar.next().name.partition("/")[0]] = archive

  @functools.cache  # noqa: B019
  def unpack(self, study: str) -> pathlib.Path:
    """The study's folder, with links to the runs of other archives."""
    check_choice("a study", study, self._archives)
    with tarfile.open(self._archives[study]) as tar:
      tar.extractall(self.folder, filter="data")
    runs = self.folder / study / "runs"
    for arm, source in SHARED.get(study, {}).items():
      other, _, name = source.partition("/")
      for run in self.unpack(other).glob(f"runs/{name or arm}-s*"):
        seed = run.name.rpartition("-")[2]
        (runs / f"{arm}-{seed}").symlink_to(run)
    return self.folder / study

  @functools.cache  # noqa: B019
  def read(self, study: str) -> StudyResults:
    """Results of a study."""
    return statistics.read_study(self.unpack(study))

  @functools.cache  # noqa: B019
  def tests(self, study: str) -> statistics.Tests:
    """The tests of a study's family."""
    return statistics.run_tests(self.read(study))


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


def pack(study: pathlib.Path, without: Collection[str]) -> pathlib.Path:
  """Archives a study: its plan, and configs, metrics, evaluations of runs."""
  names = [study / runner.STUDY, study / statistics.PREDICTIONS]
  files = [path for path in names if path.exists()]
  for run in runner.finished_runs(study):
    if not {run.arm, run.name} & {*without}:
      folder = study / runner.RUNS / run.name
      files += [folder / "config.json", folder / "metrics.jsonl"]
      files += sorted(folder.glob("evals/*.*"))
      files.append(folder / "checkpoints" / str(run.steps))  # Empty.

  def anonymize(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    mode = 0o755 if entry.isdir() else 0o644
    owner = dict(uid=0, gid=0, uname="", gname="")
    return entry.replace(mtime=0, mode=mode, deep=False, **owner)

  archive = pathlib.Path(f"{study.name}.tar.xz")
  with tarfile.open(archive, "w:xz", preset=9) as tar:
    for path in files:
      name = path.relative_to(study.parent)
      tar.add(path, name, recursive=False, filter=anonymize)
  return archive


def draw_charts(text: str, studies: Studies) -> None:
  """Draws the images of a page that follow a comment `charts: STUDY ...`."""
  for block in re.finditer(r"<!-- charts: (.+) -->\n((?:!\[.+\n)+)", text):
    folders = [studies.unpack(study) for study in block[1].split()]
    output = studies.folder / "pages" / block[1].replace(" ", "_")
    if len(folders) > 1:
      budgets.write_budgets(folders, output)
    else:
      page.write_study(folders[0], output)
    for image in re.findall(r"\((.+\.svg)\)", block[2]):
      path = DOCS / image
      path.parent.mkdir(exist_ok=True)
      shutil.copyfile(output / "charts" / path.name, path)


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
