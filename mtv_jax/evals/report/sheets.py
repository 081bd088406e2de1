"""Sheets of pictures and words, for people to look at what was found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, ImageDraw

from mtv_jax.utils.drawing import GAP, INK, PAPER, fit, font, length, shorten
from mtv_jax.utils.drawing import LINE as _LINE

_OWN = (0, 140, 90)
_FRAME = 4


def panels(
  rows: Sequence[Sequence[np.ndarray]],
  *,
  titles: Sequence[str] = (),
  size: int = 192,
) -> UInt8[np.ndarray, "h w 3"]:
  """Rows of pictures, each fitted into a square.

  Args:
    rows: of uint8 `[H, W, 3]` pictures of any size.
    titles: one above each column.
    size: side of a square.

  Raises:
    ValueError: for no rows, or rows of different lengths.
  """
  lengths = {len(row) for row in rows}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      f"panels: rows have lengths {sorted(lengths)}; expected one length, not 0"
    )
  head = _LINE + 4 if titles else 0
  side = size + GAP
  columns = lengths.pop()
  shape = (columns * side - GAP, head + len(rows) * side - GAP)
  sheet = Image.new("RGB", shape, PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, title in enumerate(titles):
    draw.text((i * side + 2, 1), title, INK, font())
  for j, row in enumerate(rows):
    for i, picture in enumerate(row):
      fitted = fit(picture, size)
      x = i * side + (size - fitted.width) // 2
      y = head + j * side + (size - fitted.height) // 2
      sheet.paste(fitted, (x, y))
  return np.asarray(sheet)


def captions_found(
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  scores: Float[np.ndarray, "n m"],
  captions: Sequence[str],
  own: Bool[np.ndarray, "n m"],
  *,
  top: int = 5,
  size: int = 144,
) -> UInt8[np.ndarray, "h w 3"]:
  """Images, each beside the captions that score best with it.

  Own captions are green and marked. Where none is among the best, the best of
  them stands below with its rank.

  Args:
    images: n of them.
    scores: of each image with each caption; equal ones in the order given.
    captions: m distinct ones.
    own: which belong to which image.
    top: how many to show.
    size: side of a picture.
  """
  width = size + 4 * GAP + 460
  height = max(size, (top + 1) * _LINE + GAP) + GAP
  sheet = Image.new("RGB", (width, height * len(images)), PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, image in enumerate(images):
    y = i * height
    sheet.paste(fit(image, size), (0, y))
    order = np.argsort(-scores[i], kind="stable")
    shown = [(rank, j) for rank, j in enumerate(order[:top])]
    if not own[i, order[:top]].any() and own[i].any():
      rank = int(np.argmax(own[i, order]))
      shown.append((rank, order[rank]))
    for k, (rank, j) in enumerate(shown):
      mine = bool(own[i, j])
      ink = _OWN if mine else INK
      x, line = size + GAP, y + k * _LINE
      if mine:
        box = (x, line + 2, x + 5, line + _LINE - 3)
        draw.rectangle(box, fill=_OWN)
      head = f"{rank + 1}.  {scores[i, j]:.3f}  "
      words = shorten(head + captions[j], width - x - 2 * GAP)
      draw.text((x + 10, line), words, ink, font())
  return np.asarray(sheet)


def images_found(
  captions: Sequence[str],
  scores: Float[np.ndarray, "n m"],
  images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
  owner: Sequence[int],
  *,
  top: int = 5,
  size: int = 120,
) -> UInt8[np.ndarray, "h w 3"]:
  """Captions, each above the images that score best with it.

  The caption's own image is framed in green. Where it is not among the best,
  the caption's line tells its rank.

  Args:
    captions: n of them.
    scores: of each caption with each image; equal ones in the order given.
    images: m of them, read only where shown.
    owner: the image of each caption.
    top: how many to show.
    size: side of a picture.
  """
  side = size + GAP
  top = min(top, len(images))
  width = max(top * side - GAP, 520)
  height = _LINE + 4 + side
  sheet = Image.new("RGB", (width, height * len(captions)), PAPER)
  draw = ImageDraw.Draw(sheet)
  for i, caption in enumerate(captions):
    order = np.argsort(-scores[i], kind="stable")
    rank = int(np.flatnonzero(order == owner[i])[0])
    tail = "" if rank < top else f"  (own image: rank {rank + 1})"
    words = shorten(caption, width - length(tail)) + tail
    draw.text((0, i * height), words, INK, font())
    for k, j in enumerate(order[:top]):
      x, y = k * side, i * height + _LINE + 2
      shown = fit(images[int(j)], size)
      sheet.paste(shown, (x, y))
      if j == owner[i]:
        frame = (x, y, x + shown.width - 1, y + shown.height - 1)
        draw.rectangle(frame, outline=_OWN, width=_FRAME)
  return np.asarray(sheet)


def unit_colours(
  components: Float32[np.ndarray, "n h w 3"],
  keep: Bool[np.ndarray, "n h w"] | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
  """Three numbers a patch as a colour, one scale for all pictures.

  Each component is stretched from its 1st to its 99th percentile over the
  patches that are kept; the others are black.
  """
  if keep is None:
    keep = np.ones(components.shape[:3], bool)
  if not keep.any():
    return np.zeros(components.shape, np.uint8)
  low, high = np.percentile(components[keep], (1, 99), axis=0)
  unit = (components - low) / np.maximum(high - low, 1e-12)
  colours = np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)
  return np.where(keep[..., None], colours, np.uint8(0))
