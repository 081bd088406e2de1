"""Sheets of scenes with their labels."""

import cv2
import numpy as np

from mtv_jax.cli import show_scenes
from mtv_jax.cli.main import run_command
from mtv_jax.data.scenes.render import render


def test_sheet_shows_scenes(tmp_path):
  sheet = np.concatenate([show_scenes.draw_row(i, size=96) for i in (0, 1)])
  assert sheet.shape[1] == 6 * 96 + 4 * 8 and sheet.dtype == np.uint8
  np.testing.assert_array_equal(sheet[:96, :96], render(0).image)
  tiles = show_scenes.draw_tiles([4, 5, 6], columns=2, size=48)
  np.testing.assert_array_equal(tiles[13:61, :48], render(4, size=48).image)
  out = tmp_path / "scenes.png"
  run_command("show_scenes", [f"--output={out}", "--count=2", "--size=48"])
  assert cv2.imread(str(out)) is not None
