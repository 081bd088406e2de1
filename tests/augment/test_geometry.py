"""Crop boxes, resampling, and labels that follow a view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mtv_jax.augment import geometry
from mtv_jax.augment.random import ranks
from mtv_jax.augment.views import ViewBatch


def uniform(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).random(shape, np.float32))


def array(*values):
  return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def resample():
  return jax.jit(geometry.resample, static_argnames=("size", "method"))


@pytest.mark.parametrize(
  "source, target, box",
  [
    (64, 24, (0.1, 0.2, 0.9, 0.7)),
    (64, 64, (0.0, 0.0, 1.0, 1.0)),
    (32, 48, (0.013, 0.6, 0.31, 0.999)),
    (48, 32, (0.5, 0.5, 0.51, 0.52)),
  ],
)
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resample_agrees_with_pillow(resample, source, target, box, method):
  # Pillow's float mode rounds nothing, so that only arithmetic differs.
  plane = np.random.default_rng(source).random((source, source), np.float32)
  y0, x0, y1, x1 = np.asarray(box) * source
  expected = Image.fromarray(plane).resize(
    (target, target), Image.Resampling[method.upper()], box=(x0, y0, x1, y1)
  )
  for flipped in (False, True):
    got = resample(
      jnp.asarray(plane)[None],
      array(*box),
      jnp.asarray(flipped),
      size=target,
      method=method,
    )[0]
    want = np.asarray(expected)[:, ::-1] if flipped else np.asarray(expected)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("start, stop", [(0.3, 0.3), (1.0, 1.0), (0.0, 1e-9)])
def test_resample_matrix_of_an_empty_interval_is_finite(start, stop):
  matrix = geometry.resample_matrix(
    jnp.float32(start), jnp.float32(stop), source=16, target=8
  )
  assert np.isfinite(matrix).all()
  np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)


def sample_boxes(crop, image_size, count, seed=0):
  u = uniform((count, crop.num_uniforms(crop.size)), seed)
  sample = jax.jit(jax.vmap(crop.box, in_axes=(None, 0)))
  return np.asarray(sample(jnp.asarray(image_size, jnp.int32), u), np.float64)


def area_and_ratio(boxes, image_size):
  """Share of the image's area, and width over height in pixels."""
  height, width = image_size
  tall, wide = (boxes[:, 2:] - boxes[:, :2]).T
  return tall * wide, (wide * width) / (tall * height)


@pytest.mark.parametrize("image_size", [(480, 640), (600, 200), (1, 1)])
def test_crops_have_the_configured_area_and_ratio(image_size):
  boxes = sample_boxes(geometry.Crop(8, 0.1, 0.3, (0.5, 2.0)), image_size, 512)
  assert (boxes >= 0).all() and (boxes <= 1).all()
  area, ratio = area_and_ratio(boxes, image_size)
  assert 0.1 - 1e-5 <= area.min() < 0.12 and 0.28 < area.max() <= 0.3 + 1e-5
  assert ratio.min() >= 0.5 - 1e-4 and ratio.max() <= 2.0 + 1e-4


def test_crops_that_never_fit_are_centred_and_largest():
  # A nearly square crop of 90 % of a panorama's area does not exist.
  boxes = sample_boxes(geometry.Crop(8, 0.9, 1.0), (100, 1000), 16)
  half = 0.5 * 100 * (4 / 3) / 1000
  expected = np.tile([0.0, 0.5 - half, 1.0, 0.5 + half], (16, 1))
  np.testing.assert_allclose(boxes, expected, atol=1e-6)
  boxes = sample_boxes(geometry.Crop(8, 0.9, 1.0), (1000, 100), 16)
  expected = np.tile([0.5 - half, 0.0, 0.5 + half, 1.0], (16, 1))
  np.testing.assert_allclose(boxes, expected, atol=1e-6)


def distribution_distance(a, b, slack):
  """Kolmogorov-Smirnov statistic if values may move by `slack`."""
  a, b = np.sort(a), np.sort(b)

  def below(values, at):
    return np.searchsorted(values, at, side="right") / len(values)

  at = np.concatenate([a, b])
  return max(
    (below(a, at - slack) - below(b, at)).max(),
    (below(b, at - slack) - below(a, at)).max(),
  )


@pytest.mark.reference
@pytest.mark.parametrize("image_size", [(480, 640), (500, 333), (300, 1000)])
@pytest.mark.parametrize("area", [(0.32, 1.0), (0.05, 0.32)])
def test_crops_are_distributed_as_torchvisions(image_size, area):
  torch = pytest.importorskip("torch")
  transforms = pytest.importorskip("torchvision.transforms")
  torch.manual_seed(0)
  blank = torch.empty(1, *image_size)
  boxes = np.array(
    [
      transforms.RandomResizedCrop.get_params(blank, list(area), [3 / 4, 4 / 3])
      for _ in range(1500)
    ],
    float,
  )
  top, left, height, width = boxes.T
  theirs = np.stack([top, left, top + height, left + width], 1)
  theirs /= np.array([*image_size, *image_size])
  ours = sample_boxes(geometry.Crop(8, *area), image_size, 6000)
  pairs = zip(
    [*area_and_ratio(ours, image_size), *ours.T],
    [*area_and_ratio(theirs, image_size), *theirs.T],
    strict=True,
  )
  # torchvision's boxes are whole pixels, which shifts areas and ratios by up
  # to two pixels.
  for mine, reference in pairs:
    assert distribution_distance(mine, reference, 3 / min(image_size)) < 0.05


def test_cropped_maps_agree_with_the_box_to_a_tenth_of_a_pixel():
  size, view = 64, 56
  ramp = (np.arange(size, dtype=np.float32) + 0.5) / size
  maps = np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], size)])
  box = np.array([[[0.2, 0.3, 0.8, 0.7], [0.1, 0.1, 0.35, 0.9]]] * 2)
  box = jnp.asarray(box, jnp.float32)
  flipped = jnp.array([[False, True]] * 2)
  values, valid = geometry.crop_maps(
    jnp.asarray(maps), jnp.ones(maps.shape, bool), box, flipped, size=view
  )
  assert values.shape == (2, 2, view, view) and np.asarray(valid).all()
  centre = (np.arange(view) + 0.5) / view
  for n in range(2):
    y0, x0, y1, x1 = np.asarray(box[0, n])
    along = centre[::-1] if flipped[0, n] else centre
    wide = np.tile(x0 + along * (x1 - x0), (view, 1))
    tall = np.tile((y0 + centre * (y1 - y0))[:, None], view)
    np.testing.assert_allclose(values[0, n], wide, atol=0.1 / size)
    np.testing.assert_allclose(values[1, n], tall, atol=0.1 / size)


def test_unlabelled_pixels_do_not_leak():
  rng = np.random.default_rng(0)
  valid = rng.random((3, 32, 32)) > 0.3
  valid[1], valid[2] = False, True
  depth = np.where(valid, 5.0, 1000.0).astype(np.float32)
  depth[2, :16] = np.nan
  depth[2, 16, 3] = np.inf
  box = jnp.tile(array(0.0, 0.0, 1.0, 1.0), (3, 1, 1))
  values, retained = geometry.crop_maps(
    jnp.asarray(depth),
    jnp.asarray(valid),
    box,
    jnp.zeros((3, 1), bool),
    size=16,
  )
  values, retained = np.asarray(values[:, 0]), np.asarray(retained[:, 0])
  np.testing.assert_allclose(values[retained], 5.0, rtol=1e-5)
  assert (values[~retained] == 0).all()
  # 30 % random holes leave most pixels valid, a map without labels leaves
  # 0, and a map whose upper half is NaN leaves its lower half.
  assert 0.85 < retained[0].mean() < 1
  assert not retained[1].any()
  assert not retained[2, :7].any() and retained[2, 9:].all()


def crop_boxes_reference(boxes, valid, box, flipped, min_visible, min_size):
  """`crop_boxes`, one box at a time in float64."""
  out = np.zeros((*box.shape[:2], *boxes.shape[1:]))
  retained = np.zeros(out.shape[:-1], bool)
  for b, n, m in np.ndindex(*retained.shape):
    y0, x0, y1, x1 = boxes[b, m]
    if not valid[b, m] or not np.isfinite(boxes[b, m]).all():
      continue
    y0, x0, y1, x1 = (min(max(v, 0.0), 1.0) for v in (y0, x0, y1, x1))
    if y1 <= y0 or x1 <= x0:
      continue
    t, l, d, r = box[b, n]
    cut = [max(y0, t), max(x0, l), min(y1, d), min(x1, r)]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
      continue
    seen = (cut[2] - cut[0]) * (cut[3] - cut[1])
    if seen < min_visible * (y1 - y0) * (x1 - x0):
      continue
    v = [
      (cut[0] - t) / (d - t),
      (cut[1] - l) / (r - l),
      (cut[2] - t) / (d - t),
      (cut[3] - l) / (r - l),
    ]
    if flipped[b, n]:
      v[1], v[3] = 1 - v[3], 1 - v[1]
    if min(v[2] - v[0], v[3] - v[1]) < min_size:
      continue
    out[b, n, m], retained[b, n, m] = v, True
  return out, retained


def test_crop_boxes_equals_a_loop():
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(-0.1, 1.1, (4, 200, 2, 2)), axis=2)
  boxes = corners.reshape(4, 200, 4).astype(np.float32)
  valid = rng.random((4, 200)) > 0.1
  view = np.sort(rng.uniform(0, 1, (4, 3, 2, 2)), axis=2).reshape(4, 3, 4)
  view[:, 0] = [0.1, 0.0, 1.0, 0.8]
  view = view.astype(np.float32)
  flipped = rng.random((4, 3)) > 0.5
  got, retained = geometry.crop_boxes(
    jnp.asarray(boxes),
    jnp.asarray(valid),
    jnp.asarray(view),
    jnp.asarray(flipped),
    min_visible=0.3,
    min_size=0.05,
  )
  want, want_retained = crop_boxes_reference(
    boxes, valid, view, flipped, 0.3, 0.05
  )
  assert 0.1 < want_retained.mean() < 0.9
  np.testing.assert_array_equal(retained, want_retained)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  "bad",
  [
    (np.nan, 0.1, 0.5, 0.5),
    (0.1, 0.1, np.inf, 0.5),
    (0.5, 0.5, 0.1, 0.1),
    (0.5, 0.1, 0.1, 0.5),
    (0.2, 0.2, 0.2, 0.6),
    (1.2, 0.1, 1.5, 0.5),
    (-0.5, -0.5, -0.1, 0.5),
    (0.0, 0.0, 0.0, 0.0),
  ],
)
def test_invalid_boxes_are_dropped_alone(bad):
  boxes = array(bad, (0.25, 0.25, 0.75, 0.5))[None]
  whole = array(0, 0, 1, 1)[None, None]
  got, retained = geometry.crop_boxes(
    boxes, jnp.ones((1, 2), bool), whole, jnp.array([[True]])
  )
  assert retained.tolist() == [[[False, True]]]
  np.testing.assert_allclose(
    got[0, 0], [[0, 0, 0, 0], [0.25, 0.5, 0.75, 0.75]], atol=1e-6
  )


@pytest.mark.parametrize("by_score", [False, True])
def test_chosen_boxes_are_visible_ones_first(by_score):
  rng = np.random.default_rng(0)
  corners = np.sort(rng.uniform(0, 1, (5, 12, 2, 2)), axis=2)
  boxes = corners.reshape(5, 12, 4).astype(np.float32)
  valid, score = rng.random((5, 12)) > 0.2, rng.random((5, 12))
  valid[1, 2:] = False
  score[0, 3] = np.nan
  crops = np.tile(np.float32([[0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]]), (5, 1, 1))
  view = ViewBatch(None, jnp.asarray(crops), jnp.array([[True, False]] * 5))
  index, chosen, visible = geometry.choose_boxes(
    jnp.asarray(boxes),
    jnp.asarray(valid),
    view,
    4,
    score=jnp.asarray(score, jnp.float32) if by_score else None,
  )
  want, retained = crop_boxes_reference(
    boxes, valid, crops[:, :1], np.ones((5, 1), bool), 0.4, 1 / 56
  )
  assert retained[1].sum() < 4 < retained[0].sum()
  for b, row in enumerate(np.asarray(index)):
    key = np.nan_to_num(score[b]) if by_score else -np.arange(12)
    order = np.argsort(-key, kind="stable")
    order = order[retained[b, 0, order]][:4].tolist()
    assert row[: len(order)].tolist() == order
    np.testing.assert_array_equal(visible[b], retained[b, 0, row])
    np.testing.assert_allclose(chosen[b], want[b, 0, row], atol=1e-5)
    values = geometry.take_boxes(jnp.arange(60).reshape(5, 12), index)
    np.testing.assert_array_equal(values[b], 12 * b + row)


def test_ranks_are_a_permutation_with_ties():
  assert ranks(array(0.5, 0.2, 0.9, 0.2)).tolist() == [2, 0, 3, 1]
  u = uniform((97,))
  np.testing.assert_array_equal(ranks(u), np.argsort(np.argsort(np.asarray(u))))
