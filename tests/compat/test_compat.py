"""Runs, exports, label sets and results of earlier code open and resume.

`fixtures.tar.xz` was written by `make_fixtures.py` with commit b0a4762.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from compat import reference
from xla_options import xla_flags

from mtv_jax.config.aliases import rename_metric

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
  folder = tmp_path_factory.mktemp("compat")
  with tarfile.open(HERE / "fixtures.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def expected(fixtures):
  """The figures of `reference.py` by encoder or label set."""
  groups = {}
  with np.load(fixtures / "reference.npz") as arrays:
    for name in arrays:
      group, _, figure = name.partition("/")
      groups.setdefault(group, {})[figure] = arrays[name]
  return groups


def run_tool(name, *arguments):
  """Runs a script of `tools/` in this process; returns what it prints."""
  output = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with contextlib.redirect_stdout(output):
      try:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
      except SystemExit as end:
        assert not end.code, end.code
  return output.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.ENCODERS)
def test_encoders_give_the_same_figures(fixtures, expected, name):
  figures = reference.encoder_figures(fixtures, name)
  assert figures.keys() == expected[name].keys()
  for figure, value in expected[name].items():
    np.testing.assert_allclose(
      figures[figure],
      value,
      rtol=TOLERANCE,
      atol=TOLERANCE,
      err_msg=f"{name}/{figure}",
    )


@pytest.mark.parametrize("join", reference.LABELS)
def test_label_sets_give_the_same_labels(fixtures, expected, join):
  figures = reference.label_figures(fixtures, join)
  assert figures.keys() == expected["labels"].keys()
  for figure, value in expected["labels"].items():
    np.testing.assert_array_equal(figures[figure], value, err_msg=figure)


def test_an_export_is_written_as_before(fixtures, tmp_path):
  run_tool(
    "convert", "to_hf", fixtures / "all", tmp_path / "a", "--weights=ema"
  )
  run_tool("convert", "from_hf", tmp_path / "a", tmp_path / "b")
  for new, old in (("a", "exported"), ("b", "native")):
    names = {p.name for p in (fixtures / old).iterdir()}
    assert {p.name for p in (tmp_path / new).iterdir()} == names
    for name in sorted(names - {"README.md"}):
      # Keys of JSON objects have no order.
      read = json.loads if name.endswith(".json") else bytes
      written, before = (
        read((folder / name).read_bytes())
        for folder in (tmp_path / new, fixtures / old)
      )
      # Keys that are new: which weights of the run, and how texts are cleaned.
      new_keys = {
        "mtv_jax.json": {"weights": "ema"},
        "tokenizer_config.json": {"clean": "lower"},
      }
      for key, value in new_keys.get(name, {}).items():
        assert written.pop(key, value) == value
      assert written == before, name


def test_results_files_stand_beside_new_figures(fixtures, tmp_path):
  run_tool(
    "evaluate",
    "--encoder=pixels:16",
    "--evals=knn",
    "--count=8",
    "--set=knn.train_count=8",
    f"--compare={fixtures}/results.json,{fixtures}/all/evals/retrieval_6.json",
    f"--output={tmp_path}",
  )
  table = (tmp_path / "results.md").read_text()
  content = json.loads((fixtures / "results.json").read_text())
  for encoder in content["encoders"]:
    assert encoder["name"] in table
    for metric, value in encoder["evals"]["retrieval"]["metrics"].items():
      row = next(line for line in table.splitlines() if f" {metric} " in line)
      numbers = [
        float(x) for x in re.findall(r"[\d.]*\d", row.split("|", 3)[3])
      ]
      assert any(abs(x - 100 * value) < 0.05 for x in numbers), (value, row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "variant"])
def test_a_run_resumes_to_the_same_losses(fixtures, name):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "mtv_jax.main",
      f"--config=recipe.py:{name}/config.json",
      f"--workdir={name}",
    ],
    cwd=fixtures,
    env={
      **os.environ,
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": xla_flags(devices=1, exact=True),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = (fixtures / name / "metrics.jsonl").read_text().splitlines()
  found = [row for row in map(json.loads, lines) if row["step"] > 2]
  wanted = json.loads((fixtures / "metrics.json").read_text())[name]["metrics"]
  assert [row["step"] for row in found] == [row["step"] for row in wanted]
  for row, before in zip(found, wanted, strict=True):
    for figure, value in before.items():
      assert row[rename_metric(figure)] == pytest.approx(
        value, rel=TOLERANCE, abs=TOLERANCE
      ), (row["step"], figure)
