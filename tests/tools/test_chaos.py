"""A run killed at random moments equals an untouched one."""

import json
import re
import subprocess
import sys

import label_samples
import pytest
import trainings
from xla_options import xla_flags

from mtv_jax.cli.main import main
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


def run_chaos(monkeypatch, output, kills, *more, steps=12):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
  options = [
    f"--config={trainings.CONFIG}:steps={steps},save=3", f"--output={output}",
    "--set=evals.retrieval.every_steps=4", f"--kills={kills}", *more,
  ]  # fmt: skip
  done = subprocess.run(
    [sys.executable, "tools/chaos.py", *options],
    cwd=trainings.ROOT, capture_output=True, text=True, timeout=250 * kills,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert "State, metrics and evaluations are equal." in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_equals_an_untouched_one(tmp_path, monkeypatch, workers):
  run_chaos(monkeypatch, tmp_path, 5, f"--set=data.workers={workers}")


@pytest.mark.long
def test_a_killed_run_in_a_bucket_equals_an_untouched_one(
  gs, tmp_path, monkeypatch
):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path))
  run_chaos(monkeypatch, f"{gs}/chaos", kills=2)


@pytest.mark.long
def test_four_killed_processes_that_read_a_bucket_in_lanes(
  gs, tmp_path, monkeypatch
):
  tars = label_samples.make_base(tmp_path, count=128, per_shard=16)
  base = label_samples.open_base(tars)
  label_samples.make_set(tmp_path / "depth", base, "depth")
  for name in ("base", "depth"):
    path.upload_folder(tmp_path / name, path.as_path(f"{gs}/pod/{name}"))
  assert main(["index", f"{gs}/pod/base/*.tar", "--records=8"]) == 0
  labels = dict(depth=f"{gs}/pod/depth")
  entry = dict(type="webdataset", path=f"{gs}/pod/base/*.tar", labels=labels)
  run_chaos(
    monkeypatch, tmp_path / "runs", 20, "--processes=4", "--seed=1",
    f"--set=data.train={[entry]}", "--set=data.shuffle=lanes",
    "--set=data.ops=decode|canvas(32)|caption(16)|depth(8)",
    "--set=objectives.depth=dict(features=8,channels=(8,8,8,8))",
    "--set=evals.retrieval.every_steps=40", steps=200,
  )  # fmt: skip
