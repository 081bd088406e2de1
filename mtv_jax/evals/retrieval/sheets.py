"""Sheets of retrieval: top captions of images, top images of captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from mtv_jax.utils import plots
from mtv_jax.utils.plots import GAP, INK, LINE_HEIGHT, PAPER

MATCH = (0, 140, 90)  # colour of the correct captions and images
_FRAME = 4


def ranked_captions(
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  scores: Float[np.ndarray, "n m"],
  captions: Sequence[str],
  correct: Bool[np.ndarray, "n m"],
  *,
  top: int = 5,
) -> UInt8[np.ndarray, "h w 3"]:
  """Images, each beside the captions of the highest scores.

  Correct captions are green and marked. If none is in the top, the best-ranked
  one is appended with its rank.

  Args:
    images: n of them.
    scores: score of each image and caption; ties keep the order of captions.
    captions: m distinct ones.
    correct: which captions belong to which image.
    top: captions per image.
  """
  size = 144  # side of an image
  width = size + 4 * GAP + 460
  height = max(size, (top + 1) * LINE_HEIGHT + GAP) + GAP
  sheet = Image.new("RGB", (width, height * len(images)), PAPER)
  draw = ImageDraw.Draw(sheet)
  x = size + GAP
  for i, image in enumerate(images):
    sheet.paste(plots.fit_image(image, size), (0, i * height))
    order = np.argsort(-scores[i], kind="stable")
    ranks = list(range(min(top, len(order))))
    if not correct[i, order[:top]].any() and correct[i].any():
      ranks.append(int(np.argmax(correct[i, order])))
    for k, rank in enumerate(ranks):
      j, y = order[rank], i * height + k * LINE_HEIGHT
      if correct[i, j]:
        draw.rectangle((x, y + 2, x + 5, y + LINE_HEIGHT - 3), fill=MATCH)
      text = f"{rank + 1}.  {scores[i, j]:.3f}  {captions[j]}"
      text = plots.shorten(text, width - x - 2 * GAP)
      ink = MATCH if correct[i, j] else INK
      draw.text((x + 10, y), text, ink, plots.font())
  return np.asarray(sheet)


def ranked_images(
  captions: Sequence[str],
  scores: Float[np.ndarray, "n m"],
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  owner: Sequence[int],
  *,
  top: int = 5,
) -> UInt8[np.ndarray, "h w 3"]:
  """Captions, each above the images of the highest scores.

  The caption's own image has a green frame, or its rank is beside the caption.

  Args:
    captions: n of them.
    scores: score of each caption and image; ties keep the order of images.
    images: m of them, decoded only where shown.
    owner: the image of each caption.
    top: images per caption.
  """
  size = 120  # side of an image
  side = size + GAP
  top = min(top, len(images))
  width = max(top * side - GAP, 520)
  height = LINE_HEIGHT + 4 + side
  sheet = Image.new("RGB", (width, height * len(captions)), PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, caption in enumerate(captions):
    order = np.argsort(-scores[i], kind="stable")
    rank = int(np.flatnonzero(order == owner[i])[0])
    suffix = "" if rank < top else f"  (own image: rank {rank + 1})"
    text = plots.shorten(caption, width - plots.text_width(suffix)) + suffix
    draw.text((0, i * height), text, INK, plots.font())
    for k, j in enumerate(order[:top]):
      x, y = k * side, i * height + LINE_HEIGHT + 2
      image = plots.fit_image(images[int(j)], size)
      sheet.paste(image, (x, y))
      if j == owner[i]:
        frame = (x, y, x + image.width - 1, y + image.height - 1)
        draw.rectangle(frame, outline=MATCH, width=_FRAME)
  return np.asarray(sheet)
