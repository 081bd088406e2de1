"""The page of studies that differ in run length."""

import pytest
import study_samples

from mtv_jax.cli import report
from mtv_jax.studies.budgets import write_budgets
from mtv_jax.utils.errors import InputError

ARMS = (("vl", ("contrastive",), 0.0), ("all", study_samples.OBJECTIVES, 0.2))


def _write(folder, budget, **options):
  defaults = dict(seeds=5, flops=4e12, interference=False, sheets=())
  study_samples.write_study(
    folder, "ladder", ARMS, budget=budget, **{**defaults, **options}
  )
  return folder


def test_page_has_each_arm_over_flops(tmp_path):
  folders = [_write(tmp_path / f"{b}", b) for b in (2.0, 0.5, 1.0)]
  report.run([*map(str, folders)], output=str(tmp_path / "page"))
  text = (tmp_path / "page/report.md").read_text()
  assert "| all, 0.5 | 5 | 200 | 2 |" in text
  rows = [r for r in text.splitlines() if r.startswith("| zero_shot/top1")]
  means, differences = rows
  assert means.count("[") == 6 and differences.count("[") == 3
  assert "better |" not in text
  header = "| metric | all, 0.5 − vl, 0.5 | all, 1 − vl, 1 | all, 2 − vl, 2 |"
  assert header in text
  chart = (tmp_path / "page/charts/budgets_zero_shot-top1.svg").read_text()
  assert chart.count("class='band'") == 2 and "TFLOP of a run" in chart
  for tflop in (2, 4, 8):
    assert f" at {tflop}<" in chart


def test_studies_that_differ_in_more_than_length_are_refused(tmp_path):
  first = _write(tmp_path / "1", 1.0)
  again = _write(tmp_path / "again", 1.0)
  with pytest.raises(InputError, match="'vl' for 400 steps"):
    write_budgets([first, again], tmp_path / "page")
  other = _write(tmp_path / "2", 2.0, variant="mu/16")
  with pytest.raises(InputError, match=r"'vl' differ in model\.variant"):
    write_budgets([first, other], tmp_path / "page")
  uncounted = _write(tmp_path / "4", 4.0, flops=None)
  with pytest.raises(InputError, match="lacks the FLOPs of 'vl'"):
    write_budgets([first, uncounted], tmp_path / "page")
