"""Drawing primitives: boxes with names, text, depth colours, grids."""

import numpy as np
import pytest

from mtv_jax.utils import plots


def extent(image, colour):
  rows, columns = np.nonzero((image == colour).all(-1))
  return rows.min(), columns.min(), rows.max(), columns.max()


def test_name_plates_lie_in_the_image_without_overlap():
  image = np.full((120, 240, 3), 128, np.uint8)
  corners = [(0, 0), (0.97, 0.97), (0, 0.97), (0.97, 0), (0, 0), (0, 0)]
  boxes = np.array([[y, x, y + 0.03, x + 0.03] for y, x in corners], np.float32)
  colours = np.array([[255, 20 * i, 0] for i in range(6)], np.uint8)
  drawn, unnamed = plots.draw_boxes(
    image, boxes, ["some words"] * 6, colours=colours
  )
  # One plate fills the first corner.
  assert unnamed == (4, 5) and drawn.shape == image.shape
  extents = [extent(drawn, colour) for colour in colours[:4]]
  plate = round(plots.text_width("some words", 11)) + 4
  for k, (top, left, bottom, right) in enumerate(extents):
    assert right - left == pytest.approx(plate, abs=6), k
    assert bottom - top >= 14, k
  # Thirty boxes at one position: those without space for a plate are returned.
  boxes = np.tile(np.array([[0.4, 0.4, 0.42, 0.42]], np.float32), (30, 1))
  colours = np.arange(90, dtype=np.uint8).reshape(30, 3) + 100
  drawn, unnamed = plots.draw_boxes(
    image, boxes, ["some words"] * 30, colours=colours
  )
  named = set(range(30)) - set(unnamed)
  assert len(named) >= 3 and 0 in named
  rows = [extent(drawn, colours[k])[:3:2] for k in sorted(named)]
  assert len(set(rows)) == len(rows)


def test_text_is_cut_to_its_width():
  long = "many\nwords " * 400
  for width in (40, 100, 300):
    cut = plots.shorten(long, width)
    assert cut.endswith("…") and "\n" not in cut
    assert width - 30 < plots.text_width(cut) <= width
    lines = plots.wrap(long, width, lines=3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(plots.text_width(line) <= width for line in lines)
  assert plots.wrap("two words", 300, lines=3) == ["two words"]


def test_depth_is_coloured_between_its_limits():
  depth = np.array([[1.0, 2.0, 4.0, 9.0]], np.float32)
  valid = np.array([[True, True, True, False]])
  far, _, near, hidden = plots.colour_depth(depth, valid=valid)[0].astype(int)
  assert far[2] > far[0] and near[0] > near[2] and not hidden.any()
  # An equal scale with values beyond its ends.
  wide = plots.colour_depth(depth, limits=(1.0, 4.0))
  assert (wide[0, :3] == plots.colour_depth(depth[:, :3])[0]).all()
  assert (wide[0, 3] == wide[0, 2]).all()


def test_image_grid_and_rows():
  grey = np.full((20, 30, 3), 128, np.uint8)
  grid = plots.image_grid([[grey, grey]], titles=("a", "b"), size=60)
  assert grid.shape == (plots.SHEET_LINE + 5 + 60, 2 * 60 + plots.GAP, 3)
  rows = [plots.hstack([grey, grey]), grey]
  assert plots.vstack(rows).shape == (40 + plots.GAP, 60 + plots.GAP, 3)
  pair = plots.image_with_maps(grey, [grey], height=40)
  assert pair.shape == (40, 120 + plots.GAP, 3)
  sheet = plots.stack_rows([pair, pair], ("image", "a long title of a map"))
  head = plots.draw_lines([("image", plots.INK)], 60, size=plots.SHEET_TEXT)
  assert sheet.shape == (len(head) + 5 + 80 + plots.GAP, 120 + plots.GAP, 3)
  np.testing.assert_array_equal(sheet[: len(head), :60], head)
  # The second title is cut to its image's width, and begins there.
  ink = np.flatnonzero((sheet[: len(head)] < 128).any((0, 2)))
  assert ink[ink > 60].min() >= 60 + plots.GAP
