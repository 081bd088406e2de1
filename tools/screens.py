"""Draws the top of a page at 1,200 and 390 pixels, in light and dark.

  python tools/screens.py runs/tiny/report.html docs/report_screen.jpg

Needs Chromium. The image has four panels: both widths, each in both themes;
they are scaled to 0.42 and 0.62 of their size.
"""

import pathlib
import shutil
import sys
import tempfile

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import chromium  # noqa: E402

# Width of the window, scale of the panel.
_PANELS = ((1200, 0.42), (390, 0.62))
_HEIGHT, _GAP, _QUALITY = 940, 12, 54


def draw(browser: chromium.Browser, page: pathlib.Path) -> Image.Image:
  """The panels side by side, cut to the same height."""
  panels = []
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "page.png"
    for width, scale in _PANELS:
      for dark in (False, True):
        browser.open(page, width=width, dark=dark)
        browser.screenshot(file)
        with Image.open(file) as image:
          # Without the scroll bar.
          box = 0, 0, image.width, round(_HEIGHT / scale)
          image = image.convert("RGB").crop(box)
        size = round(image.width * scale), _HEIGHT
        panels.append(np.asarray(image.resize(size, Image.Resampling.LANCZOS)))
        panels.append(np.full((_HEIGHT, _GAP, 3), 128, np.uint8))
  return Image.fromarray(np.concatenate(panels[:-1], axis=1))


def main(page: str, output: str) -> None:
  path = next(filter(None, map(shutil.which, chromium.NAMES)), None)
  if path is None:
    sys.exit(f"screens: needs one of {', '.join(chromium.NAMES)}.")
  with chromium.launch(path) as browser:
    draw(browser, pathlib.Path(page)).save(output, quality=_QUALITY)


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
