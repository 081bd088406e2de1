"""Metric rows with verdicts, as text and as tables."""

import dataclasses

import numpy as np
import pytest
from outcome_samples import DEPTH, make_outcome

from mtv_jax.evals.core import bootstrap, results
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.report import tables
from mtv_jax.report.page import PageFiles


def cells(line):
  return [cell.strip() for cell in line.strip("|").split("|")]


def markdown_metrics(outcomes):
  table, _ = tables.fold_metrics(outcomes, tables.compare(outcomes)).blocks
  return table.markdown(PageFiles())


def test_units_and_direction():
  lines = tables.format_metrics([make_outcome("a")]).splitlines()
  assert lines[0].split() == ["evaluation", "metric", "unit", "a", "chance"]
  want = "depth rmse m (lower) 0.500 ± 0.03 1.500"
  assert " ".join(lines[2].split()) == want
  assert lines[3].split() == ["depth", "delta1", "%", "75.00", "±", "2.00"]
  assert lines[4].split() == ["shot", "top1", "%", "25.00", "10.00"]
  assert lines[5:] == ["±: standard error over the items of the set"]


def test_markdown_marks_best_and_missing_values():
  other = make_outcome("b|c", depth=0.25)
  del other.results["shot"]
  lines = markdown_metrics([make_outcome("a"), other]).splitlines()
  assert lines[0] == "| evaluation | metric | a | b\\|c | chance |"
  rmse, delta, top1 = map(cells, lines[2:])
  both = ["0.500 ± 0.03 m", "0.250 ± 0.03 m *"]
  assert rmse == ["depth", "rmse ↓", *both, "1.500 m"]
  assert delta == ["depth", "delta1", *["75.00 ± 2.00 %"] * 2, ""]
  assert top1 == ["shot", "top1", "25.00 %", "-", "10.00 %"]


def test_results_on_other_data_are_not_compared():
  other = make_outcome("b", depth=0.25)
  protocol = {**DEPTH.protocol, "data_hash": "other"}
  other.results["depth"] = dataclasses.replace(DEPTH, protocol=protocol)
  row = tables.compare([make_outcome("a"), other])[0]
  assert row.values == (0.5, None) and row.best is None


@pytest.mark.parametrize(
  "key", ["protocol", "options", "train_hash", "train_data_hash"]
)
def test_best_needs_equal_protocols(key):
  def marked(value):
    other = make_outcome("b", depth=0.25)
    other.results["depth"].protocol[key] = value
    mine = make_outcome("a")
    mine.results["depth"].protocol[key] = "linear"
    assert tables.compare([mine, other])[0].values == (0.5, 0.25)
    return "0.250 ± 0.03 m *" in markdown_metrics([mine, other])

  assert marked("linear")
  assert not marked("dpt")


def test_equal_protocol_entries_are_shown_once(tmp_path):
  same = [make_outcome("a"), make_outcome("b")]
  shown = tables.compare_protocols(same, "depth")
  # The encoder's own entries are in the table of encoders.
  assert shown.common == {"data": "nyu", "data_hash": "1", "images": 20}
  assert shown.differing == {}
  other = make_outcome("b")
  other.results["depth"].protocol["images"] = 7
  other.results["depth"].protocol["crop"] = "eigen"
  shown = tables.compare_protocols([make_outcome("a"), other], "depth")
  assert shown.differing == {"images": [20, 7], "crop": [None, "eigen"]}
  text = tables.format_results([make_outcome("a"), other])
  assert "  images of a: 20\n  images of b: 7" in text
  assert "a:\n  encoder: a" in text
  # Tuples equal the lists that JSON makes of them.
  results.write(tmp_path / "a.json", [other])
  outcomes = [other, *results.read(tmp_path / "a.json")]
  assert tables.compare_protocols(outcomes, "shot").differing == {}


@pytest.mark.parametrize(
  ("values", "errors", "chance", "best"),
  [
    # sqrt(3² + 4²) = 5: a difference of 9.7 is not beyond 1.96 errors.
    ((60.0, 69.7), (3, 4), 10, None),
    ((60.0, 69.9), (3, 4), 10, 1),
    ((60.0, 69.9, 61.0), (3, 4, 3), 10, None),
    # p is 0.035, but 0.07 for two comparisons.
    ((60.0, 70.5), (3, 4), 10, 1),
    ((60.0, 70.5, 60.0), (3, 4, 3), 10, None),
    # Chance + 1.96 errors is 10.2.
    ((8.0, 10.1), (0.1, 0.1), 10, None),
    ((8.0, 10.3), (0.1, 0.1), 10, 1),
    ((8.0, 10.3), (0.1, 0.1), None, 1),
    # Unknown errors, in any row; missing values don't matter.
    ((10.0, 90.0), (1, None), 5, None),
    ((10.0, 90.0), (None, 1), 5, None),
    ((10.0, 90.0, None), (1, 1, None), 5, 1),
    ((90.0, None), (1, None), 5, None),
  ],
)
def test_best_is_beyond_errors_and_chance(values, errors, chance, best):
  def outcome_of(value, error):
    result = Result(
      {} if value is None else {"x": value / 100},
      {"data_hash": "1"},
      {} if chance is None else {"x": chance / 100},
      errors={} if error is None else {"x": error / 100},
    )
    return Outcome("a", "a", "student", {"e": result})

  columns = [outcome_of(*v) for v in zip(values, errors, strict=True)]
  (row,) = tables.compare(columns)
  assert row.best == best
  text = tables.format_metrics(columns)
  assert text.count(" *") == (best is not None)
  assert ("*: is better than" in text) == (best is not None)
  _, _, *line, _ = cells(markdown_metrics(columns).splitlines()[2])
  stars = ["*" in cell for cell in line]
  assert stars == [i == best for i in range(len(values))]
  assert tables.compare(columns, ranked=False)[0].best is None


def random_outcomes(rng, count):
  """Encoders of different skill on 300 shared items, two metrics."""
  skill = rng.random((300, 1)) + 0.12 * rng.standard_normal((300, count))
  skill = skill + 0.05 * np.arange(count)
  outcomes = []
  for i in range(count):
    made = bootstrap.means({"a": skill[:, i] > 0.6, "b": skill[:, i] > 0.9})
    fields = dict(errors=made.errors, resamples=made.resamples)
    protocol, chance = {"data_hash": "1"}, {"a": 0.1, "b": 0.1}
    result = Result(made.metrics, protocol, chance, **fields)
    outcomes.append(Outcome(f"{i}", "", "student", {"e": result, "f": result}))
  return outcomes


@pytest.mark.parametrize("baseline", [0, 1, 2])
def test_a_page_has_one_verdict_for_a_pair(baseline):
  """The best value matches all verdicts of a family exactly."""
  rng, num_best, num_open = np.random.default_rng(0), 0, 0
  for _ in range(12):
    outcomes = random_outcomes(rng, 3)
    rows = tables.compare(outcomes, split=True, baseline=baseline)
    # The family with each remaining arm as baseline.
    for row in rows:
      verdicts = {int(c.arm): c.verdict for c in row.differences}
      assert {*verdicts} == {0, 1, 2} - {baseline}
      if row.best == baseline:
        assert {*verdicts.values()} == {"worse"}
      elif row.best is not None:
        assert verdicts[row.best] == "better"
      leading = max(range(3), key=lambda i, row=row: row.values[i])
      if baseline == leading and {*verdicts.values()} == {"worse"}:
        assert row.best == baseline
      num_best += row.best is not None
      num_open += row.best is None
    # Main metrics are one family: two metrics, two or three pairs each.
    main = [c for row in rows if row.is_main for c in row.differences]
    smallest = min(main, key=lambda c: c.p)
    size = round(smallest.p_holm / smallest.p, 6)
    assert size in (4, 5, 6) or smallest.p_holm == 1
  assert num_best > 5 and num_open > 5


def test_descriptive_metrics_are_not_compared():
  outcomes = random_outcomes(np.random.default_rng(0), 2)
  for outcome in outcomes:
    outcome.results["feature_rank"] = outcome.results.pop("f")
  rows = tables.compare(outcomes, baseline=0)
  described = [row for row in rows if row.evaluation == "feature_rank"]
  assert len(described) == 2
  assert all((r.best, r.differences) == (None, ()) for r in described)
  # Their number does not count in the correction of the rest.
  (further,) = [r for r in rows if not r.is_main and r not in described]
  (difference,) = further.differences
  assert difference.p_holm == difference.p
