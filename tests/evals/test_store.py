"""Stored results: reused with equal settings, else evaluated again."""

import importlib
import os
import sys

import numpy as np
import pytest

import mtv_jax
from mtv_jax.evals import store as store_lib
from mtv_jax.evals.core.base import Result
from mtv_jax.evals.core.results import Outcome
from mtv_jax.evals.store import ResultStore

# Two names with equal letters and digits.
SHEETS = ["worst", "best: a/b", "best- a b"]
ENTRY = {"type": "knn", "data": "scenes", "k": (1, 2)}


@pytest.fixture
def outcome():
  result = Result(
    {"x": 0.5},
    {"data_hash": "1"},
    errors={"x": 0.1},
    resamples={"x": np.arange(4.0)},
    sheets={n: np.full((2, 3, 3), i, np.uint8) for i, n in enumerate(SHEETS)},
  )
  return Outcome("a", "path", "ema", {"knn": result, "other": result})


def test_round_trip(tmp_path, outcome):
  store = ResultStore(tmp_path / "a", {"encoder": "path"})
  assert store.find("knn", ENTRY) is None
  store.write("knn", ENTRY, outcome)
  found = store.find("knn", {**ENTRY, "k": [1, 2]})
  assert list(found.results) == ["knn"] and found.weights == "ema"
  result = found.results["knn"]
  assert result.metrics == {"x": 0.5} and result.errors == {"x": 0.1}
  np.testing.assert_array_equal(result.resamples["x"], np.arange(4.0))
  # Their names and order match the page.
  assert list(result.sheets) == SHEETS
  for i, sheet in enumerate(result.sheets.values()):
    np.testing.assert_array_equal(sheet, np.full((2, 3, 3), i, np.uint8))


def test_other_settings_are_not_found(tmp_path, outcome, monkeypatch):
  data = tmp_path / "data.json"
  data.write_text("1")
  entry = {**ENTRY, "data": str(data)}
  store = ResultStore(tmp_path / "a", {"encoder": "path"})
  store.write("knn", entry, outcome)
  assert store.find("knn", entry)
  assert store.find("knn", {**entry, "k": (1,)}) is None
  assert ResultStore(store.folder, {"encoder": "b"}).find("knn", entry) is None
  data.write_text("12")
  assert store.find("knn", entry) is None
  store.write("knn", entry, outcome)
  monkeypatch.setattr(mtv_jax, "__version__", "another")
  assert store.find("knn", entry) is None


def test_results_of_a_changed_plugin_are_not_found(
  tmp_path, outcome, monkeypatch
):
  file = tmp_path / "stored_plugin.py"
  file.write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  importlib.import_module("stored_plugin")
  entry = {**ENTRY, "data": {"type": "stored_plugin:Photos"}}
  store = ResultStore(tmp_path / "a", {"encoder": "path"})
  store.write("knn", entry, outcome)
  assert store.find("knn", entry)
  file.write_text("1")
  assert store.find("knn", entry) is None
  del sys.modules["stored_plugin"]


def test_arrays_of_an_earlier_result_are_removed(tmp_path, outcome):
  store = ResultStore(tmp_path / "a", {})
  store.write("knn", ENTRY, outcome)
  bare = Outcome("a", "path", "ema", {"knn": Result({"x": 0.1}, {})})
  store.write("knn", ENTRY, bare)
  assert [p.name for p in store.folder.iterdir()] == ["knn.json"]


def test_skips_are_stored(tmp_path):
  store = ResultStore(tmp_path / "a", {})
  store.write("knn", ENTRY, Outcome("a", "p", "ema", skipped={"knn": "no"}))
  assert store.find("knn", ENTRY).skipped == {"knn": "no"}


@pytest.mark.parametrize("damaged", ["knn.json", "knn.npz", "knn/worst.png"])
@pytest.mark.parametrize("damage", ["cut", "folder", "bits"])
def test_damaged_files_are_like_none(tmp_path, outcome, damaged, damage):
  store = ResultStore(tmp_path / "a", {})
  store.write("knn", ENTRY, outcome)
  file = store.folder / damaged
  data = file.read_bytes()
  file.unlink()
  if damage == "folder":
    file.mkdir()
  else:
    half = len(data) // 2
    bits = data[:half] + bytes(8) + data[half + 8 :]
    file.write_bytes(data[:20] if damage == "cut" else bits)
  assert store.find("knn", ENTRY) is None


def test_a_file_without_result_or_skip_is_like_none(tmp_path):
  """As left by one of several hosts after its evaluation failed."""
  store = ResultStore(tmp_path / "a", {})
  store.write("knn", ENTRY, Outcome("a", "p", "ema"))
  assert (store.folder / "knn.json").is_file()
  assert store.find("knn", ENTRY) is None


def test_files_of_all_options_are_compared(tmp_path):
  store = ResultStore(tmp_path / "a", {})
  outcome = Outcome("a", "p", "ema", skipped={"x": "no"})
  pairs, tar = tmp_path / "pairs.csv", tmp_path / "1.tar"
  run = tmp_path / "run"
  (run / "checkpoints" / "1").mkdir(parents=True)
  (run / "config.json").write_text('{"model": {}}')
  for file in (pairs, tar):
    file.write_text("1")
  entry = {"type": "x", "pairs": str(pairs), "reference": str(run)}
  entry |= {"data": {"path": f"{tmp_path}/{{1..1}}.tar"}, "k": 2}
  for change in (
    lambda: pairs.write_text("12"),
    lambda: tar.write_text("12"),
    lambda: (run / "config.json").write_text('{"model": {"depth": 2}}'),
    lambda: (run / "checkpoints" / "2").mkdir(),
  ):
    store.write("x", entry, outcome)
    assert store.find("x", entry)
    change()
    assert store.find("x", entry) is None


def test_fingerprint_follows_names_sizes_and_times(tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"12")
  first = store_lib.fingerprint(tmp_path)
  assert first == store_lib.fingerprint(tmp_path)
  os.utime(file, ns=(1, 1))
  second = store_lib.fingerprint(tmp_path)
  file.rename(tmp_path / "other.safetensors")
  assert len({first, second, store_lib.fingerprint(tmp_path)}) == 3
  assert store_lib.fingerprint("scenes of no path") == ""
