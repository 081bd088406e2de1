"""Scenes as a source: records, arguments and sizes."""

import pickle

import numpy as np
import pytest

from mtv_jax.data.scenes.render import render, render_pair
from mtv_jax.data.scenes.source import SceneSource
from mtv_jax.utils.errors import ConfigError, InputError


def test_source_is_a_source():
  source = SceneSource(size=32, length=7, first=100, seed=3)
  for i in (-1, 7, 100):
    with pytest.raises(IndexError, match="expected 0 to 6"):
      source[i]
  assert len(source) == 7 and source.name == "scenes"
  options = "size=32, length=7, first=100, seed=3, difficulty='hard'"
  options += ", cache=None, caption_kinds=None"
  assert repr(source) == f"SceneSource({options})"
  np.testing.assert_array_equal(source.shards, [7])
  record = source[2]
  assert set(record) == source.fields
  scene = render(102, size=32, seed=3)
  np.testing.assert_array_equal(record["image"], scene.image)
  np.testing.assert_array_equal(record["depth"], scene.inverse_depth)
  np.testing.assert_array_equal(record["boxes"], scene.boxes)
  assert record["captions"] == list(scene.captions)
  assert record["label"] == scene.label
  assert record["key"] == "scene-3-102"
  assert len(record["box_scores"]) == len(record["phrases"])
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again[2]["image"], record["image"])
  np.testing.assert_array_equal(source[np.int64(2)]["image"], record["image"])
  assert len({source[i]["key"] for i in range(7)}) == 7
  assert [source.label(i) for i in range(7)] == [
    source[i]["label"] for i in range(7)
  ]
  easy = SceneSource(size=32, length=7, first=100, seed=3, difficulty="easy")
  assert easy[2]["key"] == "scene-easy-3-102"
  scene = render(102, size=32, seed=3, difficulty="easy")
  np.testing.assert_array_equal(easy[2]["image"], scene.image)


def test_records_have_the_chosen_caption_kinds(tmp_path):
  options = dict(size=16, length=2, difficulty="easy")
  full, main, count = SceneSource(**options)[1]["captions"]
  for cache in (None, str(tmp_path)):  # The cache serves all choices.
    classes = SceneSource(**options, cache=cache, caption_kinds=("count",))
    assert classes[1]["captions"] == [count]
    others = SceneSource(**options, cache=cache, caption_kinds=("main", "full"))
    assert others[1]["captions"] == [full, main]
  for kinds in (("relation",), ()):
    with pytest.raises(ConfigError, match="easy scenes have full, main, count"):
      SceneSource(**options, caption_kinds=kinds)


def test_bad_arguments_are_named():
  with pytest.raises(InputError, match="index -1"):
    render(-1)
  with pytest.raises(InputError, match="index -3"):
    render_pair(-3)
  with pytest.raises(ValueError, match="size 15.*expected 16 to"):
    render(0, size=15)
  with pytest.raises(ValueError, match="seed -1"):
    render(0, seed=-1)
  with pytest.raises(ValueError, match="length 0"):
    SceneSource(length=0)
  with pytest.raises(ValueError, match="size 8"):
    SceneSource(size=8)


def test_smallest_and_odd_sizes_render():
  for size in (16, 33, 131):
    scene = render(3, size=size)
    assert scene.image.shape == (size, size, 3)
    pair = render_pair(3, size=size)
    assert pair.correspondence.shape == (size, size, 2)
