"""Memory-mapped cache of scenes: equal records, one rendering, settings."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from mtv_jax.data.scenes import render as render_lib
from mtv_jax.data.scenes.source import MANIFEST, SceneSource
from mtv_jax.utils.errors import ConfigError

OPTIONS = dict(size=24, length=9, first=5, seed=2)


def assert_equal_records(got, want):
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert np.asarray(got[name]).dtype == np.asarray(value).dtype


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_records_equal_the_rendered_ones(difficulty, tmp_path):
  options = {**OPTIONS, "difficulty": difficulty}
  cached = SceneSource(**options, cache=str(tmp_path / "a"))
  rendered = SceneSource(**options)
  for i in range(len(rendered)):
    assert_equal_records(cached[i], rendered[i])
  again = pickle.loads(pickle.dumps(cached))
  assert_equal_records(again[3], rendered[3])
  assert {type(v) for v in cached[0].values()} == {str, int, list, np.ndarray}
  assert isinstance(cached._arrays.get(0)["image"].base, np.memmap)
  with pytest.raises(IndexError):
    cached[9]


def test_scenes_are_rendered_once(tmp_path, monkeypatch):
  SceneSource(**OPTIONS, cache=str(tmp_path))[0]
  monkeypatch.setattr(render_lib, "render", None)
  assert SceneSource(**OPTIONS, cache=str(tmp_path))[8]["captions"]


def _read(folder, numbers):
  source = SceneSource(**OPTIONS, cache=folder)
  render = source._render
  source._render = lambda i: (numbers.put(i), render(i))[1]
  assert len(source[0]["captions"]) == 5


def test_processes_wait_for_the_one_that_renders(tmp_path):
  context = multiprocessing.get_context("spawn")
  numbers = context.Queue()
  processes = [
    context.Process(target=_read, args=(str(tmp_path), numbers))
    for _ in range(2)
  ]
  for process in processes:
    process.start()
  # Record 0 is rendered once more, for the shapes.
  rendered = sorted(numbers.get(timeout=60) for _ in range(10))
  for process in processes:
    process.join()
  assert [process.exitcode for process in processes] == [0, 0]
  assert rendered == [0, *range(9)] and numbers.empty()


@pytest.mark.parametrize(
  ("name", "value"), [("size", 32), ("seed", 3), ("difficulty", "easy")]
)
def test_other_settings_are_refused(name, value, tmp_path):
  SceneSource(**OPTIONS, cache=str(tmp_path))[0]
  other = SceneSource(**{**OPTIONS, name: value}, cache=str(tmp_path))
  with pytest.raises(ConfigError, match=f"records of .*'{name}'.*another"):
    other[0]


def test_an_unfinished_cache_is_written_again(tmp_path):
  source = SceneSource(**OPTIONS, cache=str(tmp_path))
  want = source[4]
  manifest = tmp_path / MANIFEST
  assert json.loads(manifest.read_text())["settings"]["seed"] == 2
  manifest.unlink()
  np.save(tmp_path / "label.npy", np.zeros(3))
  assert_equal_records(SceneSource(**OPTIONS, cache=str(tmp_path))[4], want)
  assert not [*tmp_path.glob("*.tmp")]
