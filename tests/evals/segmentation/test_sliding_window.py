"""Sliding windows: the grid, and maps equal to a loop's."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from mtv_jax.evals.core import resizing
from mtv_jax.evals.segmentation import sliding_window
from mtv_jax.evals.segmentation.sliding_window import (
  Slide,
  predict,
  window_starts,
)

PATCH, CLASSES, HEADS = 4, 5, 2
SLIDE = Slide(size=16, stride=10, short=20, multiple=4)
WEIGHTS = np.random.default_rng(3).normal(0, 3, (HEADS, 3, CLASSES))


def score(windows):
  """Scores of every head on a grid: a linear function of mean colours."""
  x = np.stack([w.astype(np.float32) / 255 for w in windows])
  n, rows, columns = (len(x), *(side // PATCH for side in x.shape[1:3]))
  x = x.reshape(n, rows, PATCH, columns, PATCH, 3).mean(axis=(2, 4)) - 0.5
  return np.einsum("nhwc,gck->nhwgk", x, WEIGHTS).astype(np.float32)


def naive(image, slide, head):
  """Full-size scores window by window, without mosaics, as in DINOv3."""
  total = 0
  for scale in slide.scales:
    short = int(slide.short * scale)
    if scale < 1:
      short += -short % PATCH
    long = int(short * max(image.shape[:2]) / min(image.shape[:2]) + 0.5)
    shape = (short, long) if image.shape[0] <= image.shape[1] else (long, short)
    small = sliding_window.resize_image(image, shape, slide.interpolation)
    size = short if long < 16 else 16
    for mirrored in (False, True)[: 1 + (slide.flips == "both")]:
      pixels = small[:, ::-1] if mirrored else small
      sums, count = np.zeros((*shape, CLASSES)), np.zeros((*shape, 1))
      counts = [max(s - size + 9, 0) // 10 + 1 for s in shape]
      for y, x in itertools.product(*map(range, counts)):
        bottom, right = min(10 * y + size, short), min(10 * x + size, long)
        if shape[0] != short:
          bottom, right = min(10 * y + size, long), min(10 * x + size, short)
        box = np.s_[
          max(bottom - size, 0) : bottom, max(right - size, 0) : right
        ]
        window = pixels[box]
        scores = score([window])[0, :, :, head].astype(np.float64)
        scores = resizing.resize(scores, window.shape[:2])
        if slide.average == "softmax":
          scores = softmax(scores)
        sums[box] += scores
        count[box] += 1
      full = resizing.resize(sums / count, image.shape[:2])
      full = full[:, ::-1] if mirrored else full
      several = len(slide.scales) > 1 or slide.flips == "both"
      total = total + (
        softmax(full) if several and slide.average == "scores" else full
      )
  return total


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  shapes = [(40, 60), (70, 33), (12, 50), (16, 16)]
  blobs = [rng.integers(0, 256, (h // 5, w // 5, 3)) for h, w in shapes]
  return [
    resizing.resize(b.astype(np.float32), s, method="bicubic")
    .clip(0, 255)
    .astype(np.uint8)
    for b, s in zip(blobs, shapes, strict=True)
  ]


def test_window_grid():
  # ceil((L - 512) / 341) + 1 windows, the last one shifted back inside.
  grid = functools.partial(window_starts, window=512, stride=341)
  assert grid(300) == [0]
  assert grid(512) == [0]
  assert grid(513) == [0, 1]
  assert grid(683) == [0, 171]
  assert grid(853) == [0, 341]
  assert grid(854) == [0, 341, 342]
  assert grid(2048) == [0, 341, 682, 1023, 1364, 1536]


def test_resized_shapes():
  """DINOv3's: an image of 300 x 400 becomes 512 x 683."""
  assert sliding_window.resized_shape(300, 400, short=512) == (512, 683)
  assert sliding_window.resized_shape(640, 480, short=512) == (683, 512)
  # TIPS rounds down.
  down = functools.partial(sliding_window.resized_shape, rounding="down")
  assert down(300, 400, short=512) == (512, 682)
  assert down(512, 683, short=448) == (448, 597)


def test_scales_below_1_have_sides_of_32_and_smaller_windows():
  """DINOv3's: 0.9 x 512 is 480, so a window has 480 x 512."""
  slide = Slide(size=512, stride=341, short=512, scales=(0.9, 1.0, 1.1))
  shapes = [slide.shape(300, 400, scale=s) for s in slide.scales]
  assert shapes == [(480, 640), (512, 683), (563, 751)]
  windows = [slide.window(*shape) for shape in shapes]
  assert windows == [(480, 512), (512, 512), (512, 512)]
  assert slide.window(640, 480) == (512, 480)
  # Both sides are smaller: the square of the shorter one.
  assert slide.shape(300, 400, scale=0.5) == (256, 341)
  assert slide.window(256, 341) == (256, 256)
  assert window_starts(341, window=256, stride=341) == [0, 85]
  patch_14 = dataclasses.replace(slide, size=518, short=518, multiple=14)
  assert patch_14.shape(300, 400, scale=0.9) == (476, 635)


def test_windows_are_not_padded(images):
  slide = dataclasses.replace(SLIDE, scales=(0.55, 1.0))
  shapes = []

  def record(windows):
    shapes.extend(window.shape[:2] for window in windows)
    assert {w.shape for w in windows} == {windows[0].shape}
    assert all(w.dtype == np.uint8 for w in windows)
    return score(windows)

  list(predict(images, record, slide, batch_size=3))
  # 16 x 16 pixels at 0.55 of 20: 11 pixels, rounded up to 12.
  assert set(shapes) == {(16, 16), (12, 16), (16, 12), (12, 12)}


VARIANTS = {
  "plain": {},
  "views": {"scales": (0.55, 1.0, 1.45), "flips": "both"},
  "small": {"scales": (0.55,), "average": "softmax"},
  "flips": {"flips": "both"},
  "softmax": {"average": "softmax", "interpolation": "bicubic"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mosaics_equal_a_loop(images, variant):
  slide = dataclasses.replace(SLIDE, **VARIANTS[variant])
  predictions = list(predict(images, score, slide, batch_size=3))
  assert [len(p) for p in predictions] == [HEADS] * len(images)
  for image, maps in zip(images, predictions, strict=True):
    for head, predicted in enumerate(maps):
      expected = naive(image, slide, head)
      assert predicted.shape == image.shape[:2]
      assert predicted.dtype == np.uint8
      top = np.sort(expected, axis=-1)
      # Equal up to rounding.
      sure = top[..., -1] - top[..., -2] > 1e-5
      assert sure.mean() > 0.99
      wrong = (predicted != expected.argmax(axis=-1)) & sure
      assert not wrong.any()
  # The maps have several classes.
  assert len(np.unique(predictions[0][0])) > 2


@pytest.mark.parametrize("rows", [7, 10_000])
def test_maps_do_not_depend_on_batches_and_blocks(images, monkeypatch, rows):
  want = list(predict(images, score, SLIDE, batch_size=1))
  monkeypatch.setattr(sliding_window, "_BLOCK_BYTES", 4 * 60 * CLASSES * rows)
  for batch_size in (7, 100):
    got = list(predict(images, score, SLIDE, batch_size=batch_size))
    for a, b in zip(want, got, strict=True):
      np.testing.assert_array_equal(np.stack(a), np.stack(b))


def test_an_error_while_reading_is_raised(images):
  class Broken(list):
    def __getitem__(self, i):
      if i == 2:
        raise OSError("image 2 is corrupt")
      return super().__getitem__(i)

  with pytest.raises(OSError, match="image 2"):
    list(predict(Broken(images), score, SLIDE, batch_size=4))


def test_options_are_checked():
  with pytest.raises(ValueError, match="scales is empty"):
    Slide(size=16, stride=8, short=16, scales=())
  with pytest.raises(ValueError, match="gaps"):
    Slide(size=16, stride=17, short=16)
