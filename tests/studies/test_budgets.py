"""The page of studies that differ in run length."""

import json
import shutil

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
  assert "| all, 0.5 | 5 of 5 seeds | 200 | 2 |" in text
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


def test_pages_tell_few_seeds_and_missing_runs(tmp_path):
  folders = [_write(tmp_path / f"{b}", b, seeds=2) for b in (1.0, 2.0)]
  for seed in (0, 1):
    shutil.rmtree(tmp_path / f"2.0/runs/vl-s{seed}")
  shutil.rmtree(tmp_path / "2.0/runs/all-s1")
  _, page = write_budgets(folders, tmp_path / "page")
  text = page.read_text()
  assert "| all, 2 | 1 of 2 seeds | 800 |" in text and "| vl, 2" not in text
  assert "fewer than 5 seeds" in text
  assert "## Differences from vl\n\n| metric | all, 1 |" in text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"budget": 1.0}, "two studies have the budget 1:"),
    ({"match": "flops"}, r"differ in match \(images, flops\)"),
    ({"baseline": "all"}, r"differ in baseline \(vl, all\)"),
    ({"schedule": {"name": "wsd"}}, "'vl' differ in schedule"),
    ({"optim": {"rules": [["a", {"lr": 0}]]}}, r"differ in optim\.rules"),
    ({"schedule": {"warmup_percent": 5}}, r"schedule\.warmup_percent"),
    ({"schedule": {"warmup_steps": 20}}, r"differ in schedule\.warmup: "),
    ({"schedule": {"warmup_examples": 9}}, r"differ in schedule\.warmup: "),
    ({"optim": {"rules": [["a", {"start_steps": 9}]]}}, r"rules\.0\.start: "),
    ({"flops": None}, "no FLOPs of its runs"),
  ],
  ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_studies_that_differ_in_more_are_refused(tmp_path, changes, message):
  first = _write(tmp_path / "first", 1.0)
  second = _write(tmp_path / "second", 2.0)
  for folder, steps in ((first, 20), (second, 41)):  # 40 up to rounding.
    study = json.loads((folder / "study.json").read_text())
    run = study["runs"][0]
    run["settings"]["schedule"] = {"warmup_steps": steps}
    run["settings"]["optim"] = {"rules": [["a", {"start_steps": steps}]]}
    for key, value in changes.items() if folder == second else ():
      places = (study, run, run["settings"])
      next((x for x in places if key in x), places[-1])[key] = value
    (folder / "study.json").write_text(json.dumps(study))
    shutil.rmtree(folder / "runs/vl-s0")  # Of the settings before.
  with pytest.raises(InputError, match=message):
    write_budgets([first, second], tmp_path / "page")
