"""Grounding: losses in float64, boxes to try them on, an encoder of colours."""

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import Boxes, Regions, normalize
from mtv_jax.evals import grounding


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def region_loss(region, text, scale, bias, *, phrase_id, valid):
  total = 0.0
  for a in np.flatnonzero(valid):
    for b in np.flatnonzero(valid):
      logit = scale * region[a] @ text[b] + bias
      if a == b:
        total += np.logaddexp(0.0, -logit)
      elif phrase_id[a] != phrase_id[b]:
        total += np.logaddexp(0.0, logit)
  return total / max(valid.sum(), 1)


def gradients_of(function, *arguments, step=1e-6):
  gradients = []
  for i, x in enumerate(arguments):
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
      sides = []
      for sign in (1, -1):
        moved = x.copy()
        moved[index] += sign * step
        sides.append(function(*arguments[:i], moved, *arguments[i + 1 :]))
      gradient[index] = (sides[0] - sides[1]) / (2 * step)
    gradients.append(gradient)
  return gradients


def iou(a, b):
  """IoU and GIoU from the paper's algorithm."""

  def area(y0, x0, y1, x1):
    return max(y1 - y0, 0) * max(x1 - x0, 0)

  low, high = np.minimum(a, b), np.maximum(a, b)
  both = area(high[0], high[1], low[2], low[3])
  union = area(*a) + area(*b) - both
  around = area(low[0], low[1], high[2], high[3])
  return both / union, both / union - (around - union) / around


def box_loss(located, boxes):
  total = 0.0
  for (cy, cx, h, w), box in zip(located, boxes, strict=True):
    target = [
      (box[0] + box[2]) / 2, (box[1] + box[3]) / 2,
      box[2] - box[0], box[3] - box[1],
    ]  # fmt: skip
    corners = np.array([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2])
    total += 5 * np.abs([cy, cx, h, w] - np.array(target)).sum()
    total += 2 * (1 - iou(corners, box)[1])
  return total


def some_boxes(n, seed=0):
  rng = np.random.default_rng(seed)
  low, sides = rng.uniform(size=(2, n, 2))
  boxes = np.concatenate([0.6 * low, 0.6 * low + 0.1 + 0.3 * sides], axis=1)
  return np.float64(np.float32(boxes))


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def padded(images, lists, function, channels):
  """Values of `function` for each image and item, and their mask."""
  shape = len(images), max(map(len, lists))
  out, valid = np.zeros((*shape, channels), np.float32), np.zeros(shape, bool)
  for i, items in enumerate(lists):
    for k, item in enumerate(items):
      out[i, k], valid[i, k] = function(images[i], item), True
  return out, valid


class Painter(Encoder):
  """Embeds a box as its mean colour, and locates the pixels of a colour."""

  predicts = ("grounding", "locator")

  def __init__(self):
    pass

  def can_predict(self, name):
    return name in self.predicts

  def text(self, strings, *, batch_size=256, length=None):
    words = [[w for w in COLOURS if w in string] for string in strings]
    rows = [COLOURS[names[0]] if names else (1, 1, 1) for names in words]
    return np.asarray(rows, np.float32)

  def ground(self, images, boxes, *, batch_size=16):
    def embed(image, box):
      pixels = grounding.crop_box(image, box).reshape(-1, 3)
      return normalize(pixels.mean(axis=0)[None])[0]

    return Regions(*padded(images, boxes, embed, 3))

  def locate(self, images, phrases, *, batch_size=16):
    def find(image, phrase):
      y, x = np.nonzero((image == COLOURS[phrase]).all(axis=-1))
      if not len(y):
        return np.zeros(4)
      corners = (y.min(), x.min(), y.max() + 1, x.max() + 1)
      return np.asarray(corners) / np.tile(image.shape[:2], 2)

    return Boxes(*padded(images, phrases, find, 4))

  def protocol(self):
    return {"encoder": "painter"}
