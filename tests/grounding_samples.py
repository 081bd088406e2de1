"""Grounding's losses in float64, from the papers, and boxes to try them on."""

import numpy as np


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
