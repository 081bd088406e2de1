"""tools/study_pages.py: tables and charts of docs/study are of its runs."""

import pytest
import study_samples

from mtv_jax.studies import statistics
from mtv_jax.utils.errors import UserError
from tools import study_pages


@pytest.fixture(scope="module")
def studies():
  return study_pages.Studies()


def test_pages_of_the_study_are_of_its_runs(studies):
  tables = charts = 0
  for path in study_pages.DOCS.glob("*.md"):
    text = path.read_text()
    lines = text.split("\n")
    assert [*study_pages.write_tables(lines, studies)] == lines, path.name
    for line in lines:
      # A comment that is not read would leave its table as it is.
      if line.startswith("<!--") and not line.startswith("<!-- charts: "):
        assert study_pages.COMMENT.fullmatch(line), line
        tables += 1
    for file, svg in study_pages.draw_charts(text, studies).items():
      drawn, committed = (
        x.partition("</style>")[2] for x in (svg, file.read_text())
      )
      assert drawn and drawn == committed, file.name
      charts += 1
  assert tables and charts
  page = (study_pages.DOCS / "controls.md").read_text()
  other = page.replace("| 82.9 |", "| 83.0 |", 1)
  assert other != page
  assert "\n".join(study_pages.write_tables(other.split("\n"), studies)) == page


@pytest.mark.parametrize(
  ("comment", "message"),
  [
    ("captions: depth", "an arm is 'depth'"),
    ("captions: vl_classes: intervals", "Did you mean 'interval'"),
    ("captions: depth_classes - vl_classes: verdicts", "mean 'verdict'"),
    ("caption: vl", "Did you mean 'captions'"),
  ],
)
def test_comments_with_typos_are_refused(studies, comment, message):
  lines = [f"<!-- {comment} -->", "| |", "|-|", "| knn/top1_k10 | 1 |", ""]
  with pytest.raises(UserError, match=message):
    [*study_pages.write_tables(lines, studies)]


def test_a_study_is_read_from_the_table_as_from_its_folder(tmp_path):
  arms = (
    ("vl", ("contrastive",), 0.0),
    ("all", study_samples.OBJECTIVES, 0.2),
  )
  table, folders = tmp_path / "runs.parquet", [tmp_path / n for n in "ab"]
  for folder in folders:
    options = dict(seeds=5, flops=4e12, interference=False, sheets=())
    study_samples.write_study(folder, "ladder", arms, **options)
    study_pages.add_study(table, folder, without=["vl-s0"])
  study_pages.add_study(table, folders[0])  # Replaces its rows.
  studies = study_pages.Studies(table)
  read, partial = (studies.read(name) for name in "ab")
  expected = statistics.read_study(folders[0])
  assert read.measurements.values == expected.measurements.values
  assert (read.metrics, read.losses) == (expected.metrics, expected.losses)
  tests, found = (statistics.run_tests(r) for r in (expected, read))
  assert found.keys() == tests.keys()
  for key, test in tests.items():
    assert found[key].verdict == test.verdict
    assert found[key].high == pytest.approx(test.high, rel=1e-6), key
  assert partial.unfinished == ("vl-s0",)
  assert [*partial.measurements.values["vl"]] == [1, 2, 3, 4]
