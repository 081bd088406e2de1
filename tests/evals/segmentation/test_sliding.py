"""Sliding windows: the grid, and the same maps as the plain loop."""

import dataclasses

import numpy as np
import pytest

from mtv_jax.evals.core import resizing
from mtv_jax.evals.segmentation import sliding
from mtv_jax.evals.segmentation.sliding import Slide

GRID, CLASSES, HEADS = 4, 5, 2
FILL = np.array([10.5, 20.25, 30.0], np.float32)
SLIDE = Slide(size=16, stride=10, short=20)
WEIGHTS = np.random.default_rng(3).normal(0, 3, (HEADS, 3, CLASSES))


def score(windows):
  """Scores of every head on a grid: a linear function of mean colours."""
  x = np.stack([w.astype(np.float32) / 255 for w in windows])
  side = x.shape[1] // GRID
  x = x.reshape(len(x), GRID, side, GRID, side, 3).mean(axis=(2, 4)) - 0.5
  return np.einsum("nhwc,gck->nhwgk", x, WEIGHTS).astype(np.float32)


def naive(image, slide, head):
  """Full-size scores window by window, without mosaics."""
  total = 0
  for scale in slide.scales:
    short = int(slide.short * scale + 0.5)
    shape = sliding.resized(*image.shape[:2], short=short)
    small = sliding.resize_image(image, shape, slide.interpolation)
    for mirrored in (False, True)[: 1 + (slide.flips == "both")]:
      pixels = small[:, ::-1] if mirrored else small
      sums, count = np.zeros((*shape, CLASSES)), np.zeros((*shape, 1))
      for y in sliding.starts(shape[0], window=16, stride=slide.stride):
        for x in sliding.starts(shape[1], window=16, stride=slide.stride):
          window = sliding.pad(pixels[y : y + 16, x : x + 16], 16, FILL)
          found = score([window])[0, :, :, head].astype(np.float64)
          found = resizing.resize(found, (16, 16))
          if slide.average == "softmax":
            found = softmax(found)
          part = sums[y : y + 16, x : x + 16]
          part += found[: part.shape[0], : part.shape[1]]
          count[y : y + 16, x : x + 16] += 1
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
  starts = lambda length: sliding.starts(length, window=512, stride=341)  # noqa: E731
  assert starts(300) == [0]
  assert starts(512) == [0]
  assert starts(513) == [0, 1]
  assert starts(683) == [0, 171]
  assert starts(853) == [0, 341]
  assert starts(854) == [0, 341, 342]
  assert starts(2048) == [0, 341, 682, 1023, 1364, 1536]


def test_shapes_keep_their_ratio():
  assert sliding.resized(480, 640, short=512) == (512, 682)
  assert sliding.resized(640, 480, short=512) == (682, 512)
  assert sliding.resized(512, 683, short=448) == (448, 597)


VARIANTS = {
  "plain": {},
  "views": {"scales": (0.7, 1.0, 1.45), "flips": "both"},
  "flips": {"flips": "both"},
  "softmax": {"average": "softmax", "interpolation": "bicubic"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mosaics_are_the_plain_loop(images, variant):
  slide = dataclasses.replace(SLIDE, **VARIANTS[variant])
  found = list(sliding.predict(images, score, slide, fill=FILL, batch_size=3))
  assert [len(f) for f in found] == [HEADS] * len(images)
  for image, maps in zip(images, found, strict=True):
    for head, predicted in enumerate(maps):
      expected = naive(image, slide, head)
      assert predicted.shape == image.shape[:2]
      assert predicted.dtype == np.uint8
      top = np.sort(expected, axis=-1)
      # Equal wherever rounding can't decide.
      sure = top[..., -1] - top[..., -2] > 1e-5
      assert sure.mean() > 0.99
      wrong = (predicted != expected.argmax(axis=-1)) & sure
      assert not wrong.any()
  # The maps say something: no class has everything.
  assert len(np.unique(found[0][0])) > 2


def test_batches_do_not_matter(images):
  maps = [
    list(sliding.predict(images, score, SLIDE, fill=FILL, batch_size=b))
    for b in (1, 7, 100)
  ]
  for other in maps[1:]:
    for a, b in zip(maps[0], other, strict=True):
      np.testing.assert_array_equal(np.stack(a), np.stack(b))


def test_memory_is_bounded_by_blocks(images, monkeypatch):
  whole = list(sliding.predict(images, score, SLIDE, fill=FILL, batch_size=4))
  monkeypatch.setattr(sliding, "_BLOCK", 4 * 60 * CLASSES * 7)
  parts = list(sliding.predict(images, score, SLIDE, fill=FILL, batch_size=4))
  for a, b in zip(whole, parts, strict=True):
    np.testing.assert_array_equal(np.stack(a), np.stack(b))


def test_padding_is_the_fill_and_windows_keep_their_type():
  image = np.full((10, 16, 3), 200, np.uint8)
  padded = sliding.pad(image, 16, FILL)
  assert padded.dtype == np.float32
  np.testing.assert_array_equal(padded[10:], np.broadcast_to(FILL, (6, 16, 3)))
  assert (
    sliding.pad(padded[:, :, 0].astype(np.uint8), 16, 255).dtype == np.uint8
  )
  square = np.zeros((16, 16, 3), np.uint8)
  assert sliding.pad(square, 16, FILL) is square


def test_a_failing_image_is_an_error(images):
  class Broken(list):
    def __getitem__(self, i):
      if i == 2:
        raise OSError("image 2 is damaged")
      return super().__getitem__(i)

  with pytest.raises(OSError, match="image 2"):
    list(sliding.predict(Broken(images), score, SLIDE, fill=FILL, batch_size=4))


def test_options_are_checked():
  with pytest.raises(ValueError, match="flips='horizontal'"):
    Slide(size=16, stride=8, short=16, flips="horizontal")
  with pytest.raises(ValueError, match="gaps"):
    Slide(size=16, stride=17, short=16)


@pytest.mark.reference
def test_as_torch(images):
  import torch
  import torch.nn.functional as F

  image = images[0]
  shape = sliding.resized(40, 60, short=20)
  pixels = torch.from_numpy(
    sliding.resize_image(image, shape, "bilinear").copy()
  )
  logits = torch.zeros(CLASSES, *shape, dtype=torch.float64)
  count = torch.zeros(shape, dtype=torch.float64)
  rows, columns = [0, 4], [0, 10, 14]
  for y in rows:
    for x in columns:
      window = pixels[y : y + 16, x : x + 16].numpy()
      cells = torch.from_numpy(score([window])[0, :, :, 0]).double()
      full = F.interpolate(
        cells.permute(2, 0, 1)[None], size=(16, 16), mode="bilinear"
      )[0]
      logits[:, y : y + 16, x : x + 16] += full
      count[y : y + 16, x : x + 16] += 1
  logits = F.interpolate((logits / count)[None], size=(40, 60), mode="bilinear")
  top = logits[0].softmax(dim=0).sort(dim=0).values
  theirs = logits[0].argmax(dim=0).numpy()
  (ours,) = sliding.predict([image], score, SLIDE, fill=FILL, batch_size=4)
  sure = (top[-1] - top[-2]).numpy() > 1e-6
  assert sure.mean() > 0.999
  np.testing.assert_array_equal(ours[0][sure], theirs[sure])
