"""Two nearest neighbours, ratio weights, and input sizes."""

import numpy as np
import pytest

from mtv_jax.encoder import baselines
from mtv_jax.evals.correspondence import geometric as matching
from mtv_jax.evals.correspondence.correspondence_evaluator import (
  CorrespondenceEvaluator,
)

# One set of shapes, so that few programs are compiled.
GRID, CELLS, WIDTH = 5, 20, 12


@pytest.fixture(scope="module")
def maps():
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, GRID, GRID, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def valid():
  return np.random.default_rng(1).random((2, CELLS, CELLS)) < 0.6


def two_nearest(queries, rows):
  """Among descriptors as a map of one row, whose cells are its patches."""
  valid = np.ones((1, len(rows)), bool)
  queries, rows = np.float32(queries), np.float32(rows)
  return matching.two_nearest(queries, rows[None], valid=valid)


def keys(x):
  """Keys' cubic convolution, a = -0.75."""
  x = abs(x)
  if x <= 1:
    return (1.25 * x - 2.25) * x * x + 1
  return -0.75 * (((x - 5) * x + 8) * x - 4) if x < 2 else 0.0


def upsampled(features, size):
  """Bicubic, one output at a time, in float64."""
  matrix = np.zeros((size, len(features)))
  for i in range(size):
    centre = (i + 0.5) * len(features) / size - 0.5
    for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
      clipped = min(max(tap, 0), len(features) - 1)
      matrix[i, clipped] += keys(tap - centre)
  return np.einsum("yh,xw,hwd->yxd", matrix, matrix, features)


def unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_golden_weights():
  distances = np.array([(0.1, 0.2), (0.0, 0.3), (0.25, 0.26), (0.4, 0.4)])
  got = matching.ratio_weights(distances)
  np.testing.assert_allclose(got, [0.5, 1.0, 0.038462, 0.0], atol=5e-7)
  # Equal descriptors have a weight of 0 at any distance.
  assert matching.ratio_weights(np.zeros((1, 2)))[0] == 0


def test_matches_equal_those_of_upsampled_descriptors(maps, valid):
  got = matching.match(
    *maps, first_valid=valid[0], second_valid=valid[1], keep=50
  )
  first, second = (unit(upsampled(m.astype(np.float64), CELLS)) for m in maps)
  distance = 1 - first[valid[0]] @ second[valid[1]].T
  order = np.argsort(distance, axis=1, kind="stable")[:, :2]
  two = np.take_along_axis(distance, order, axis=1)
  weight = 1 - two[:, 0] / two[:, 1]
  best = np.argsort(-weight, kind="stable")[:50]
  assert valid[0].sum() > 200
  np.testing.assert_array_equal(got.first, np.argwhere(valid[0])[best])
  np.testing.assert_array_equal(
    got.second, np.argwhere(valid[1])[order[best, 0]]
  )
  np.testing.assert_allclose(got.weight, weight[best], atol=1e-5)
  # The ratio decides, not the nearest distance.
  assert set(best) != set(np.argsort(two[:, 0])[:50])


def test_blocks_change_nothing(maps, valid):
  queries = maps[0].reshape(-1, WIDTH)
  whole, parts = (
    matching.two_nearest(queries, maps[1], valid=valid[1], block_bytes=size)
    for size in (2**22, 3000)
  )
  np.testing.assert_array_equal(whole[0], parts[0])
  np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


def test_ties_are_exact_and_the_first_wins():
  rng = np.random.default_rng(2)
  rows = rng.normal(size=(40, 7))
  # Rows 3, 8 and 39 are equal up to their norm.
  rows[8], rows[39] = 2 * rows[3], 4 * rows[3]
  index, distance = two_nearest([rows[3], rows[10], np.zeros(7)], rows)
  assert index[0].tolist() == [3, 8]
  assert distance[0, 0] == distance[0, 1] < 1e-12
  assert index[1, 0] == 10
  assert distance[1, 0] < 1e-12
  # A zero vector is at distance 1 from every vector.
  assert index[2].tolist() == [0, 1]
  assert distance[2].tolist() == [1, 1]


def test_small_distances_are_accurate():
  """1 - cos of float32 unit vectors would err by half here."""
  angle = np.array([3e-4, 5e-4])
  rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
  _, distance = two_nearest([[1, 0]], rows)
  np.testing.assert_allclose(distance[0], angle**2 / 2, rtol=1e-3)


def test_highest_weights_first_then_lowest_index():
  queries = np.float32(
    [(1, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0), (0, 0, 1, 1), (2, 1, 0, 0)]
  )[None]
  candidates, valid = np.eye(4, dtype=np.float32)[None], np.ones((1, 5), bool)
  got = matching.match(
    *(queries, candidates),
    first_valid=valid,
    second_valid=valid[:, :4],
    keep=4,
  )
  # 1 and 2 are exact, 4 has a ratio, 0 and 3 have equal distances.
  assert got.first[:, 1].tolist() == [1, 2, 4, 0]
  assert got.second[:, 1].tolist() == [2, 0, 0, 0]
  np.testing.assert_allclose(got.weight[[0, 1, 3]], [1, 1, 0], atol=1e-6)


def test_invalid_inputs(maps, valid):
  queries = maps[0].reshape(-1, WIDTH).copy()
  one = np.zeros_like(valid[1])
  one[3, 4] = True
  with pytest.raises(ValueError, match="1 candidates; a ratio .* needs two"):
    matching.two_nearest(queries, maps[1], valid=one)
  queries[7, 2] = np.nan
  with pytest.raises(ValueError, match="1 of 25 queries are not finite"):
    matching.two_nearest(queries, maps[1], valid=valid[1])


@pytest.mark.parametrize(
  ("patch", "size", "published", "want"),
  [
    (16, None, 512, 512),
    (14, None, 512, 448),
    (8, None, 512, 512),
    (14, None, 800, 700),
    (14, 896, 800, 896),
    (14, 800, 512, "800x800 .*14x14; the nearest .*798x798"),
  ],
)
def test_input_size_preserves_the_published_grid(patch, size, published, want):
  evaluator = CorrespondenceEvaluator(size=size)
  encoder = baselines.PixelEncoder(8 * patch, patch)
  if isinstance(want, str):
    with pytest.raises(ValueError, match=want):
      evaluator._input_size(encoder, published)
  else:
    assert evaluator._input_size(encoder, published) == want


def test_final_norm_needs_the_last_layer():
  encoder = baselines.load("random:mu/8@16")
  image = np.zeros((16, 16, 3), np.uint8)
  with pytest.raises(ValueError, match="layer=-2: the final norm follows"):
    CorrespondenceEvaluator(layer=-2, norm="final")._encode(encoder, [image])
