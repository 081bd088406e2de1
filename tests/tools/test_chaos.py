"""A run killed at random moments equals an untouched one."""

import json
import re
import subprocess
import sys

import pytest
import trainings
from xla_options import xla_flags

from mtv_jax.utils import path
from tools import chaos


@pytest.mark.parametrize(
  ("line", "difference"),
  [
    ('{"step": 2, "loss": 0.5, "speed/step": 7, "n": {"a": 1, "b": 2}}', ""),
    ('{"loss": 0.5, "step": 2, "n": {"a": 1, "b": 2}}', "order of keys"),
    ('{"step": 2, "loss": 0.5, "n": {"b": 2, "a": 1}}', "order of keys"),
    ('{"step": 2, "loss": 0.25, "n": {"a": 1, "b": 2}}', r"\['loss'\]"),
    ('{"step": 2, "loss": 0.5}', r"\['n'\]"),
    ("", "2 rows and 1"),
  ],
)
def test_rows_are_compared_with_the_order_of_their_keys(
  tmp_path, line, difference
):
  first = json.dumps({"step": 1, "loss": 1.0})
  expected = '{"step": 2, "loss": 0.5, "n": {"a": 1, "b": 2}, "goodput/x": 1}'
  rows = []
  for last in (expected, line):
    text = f"{first}\n{last}\n" if last else f"{first}\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    rows.append(chaos.read_rows(tmp_path))
  actual = chaos.first_difference(*rows)
  assert re.search(difference, actual) if difference else actual == ""


def run_chaos(monkeypatch, output, kills):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
  options = [
    f"--config={trainings.CONFIG}:steps=12,save=3", f"--output={output}",
    "--set=evals.retrieval.every_steps=4", f"--kills={kills}",
  ]  # fmt: skip
  done = subprocess.run(
    [sys.executable, "tools/chaos.py", *options],
    cwd=trainings.ROOT, capture_output=True, text=True, timeout=500,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert "State, metrics and evaluations are equal." in done.stdout


@pytest.mark.long
def test_a_killed_run_equals_an_untouched_one(tmp_path, monkeypatch):
  run_chaos(monkeypatch, tmp_path, kills=5)


@pytest.mark.long
def test_a_killed_run_in_a_bucket_equals_an_untouched_one(
  gs, tmp_path, monkeypatch
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  run_chaos(monkeypatch, f"{gs}/chaos", kills=2)
