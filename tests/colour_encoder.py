"""An encoder of mean colours, for tests of evaluations."""

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import ImageFeatures

COLOURS = {
  "red": (255, 0, 0),
  "green": (0, 255, 0),
  "blue": (0, 0, 255),
  "white": (255, 255, 255),
}


class ColourEncoder(Encoder):
  """Embeds the mean colour of an image, and the colours that a text names."""

  source = "colours"
  weights = "student"

  def __init__(self):
    self.batches = []

  def __repr__(self):
    return "ColourEncoder()"

  def image(self, images, *, layers=(), outputs=("pooled",), batch_size=64):
    assert not layers
    assert tuple(outputs) == ("pooled",)
    rows = [images[i].reshape(-1, 3).mean(axis=0) for i in range(len(images))]
    return ImageFeatures(np.asarray(rows, np.float32) / 255, None, None, {})

  def text(self, strings, *, batch_size=256):
    self.batches.append(len(strings))
    rows = []
    for string in strings:
      words = string.lower().replace(".", "").split()
      found = [COLOURS[w] for w in words if w in COLOURS] or [(1, 1, 1)]
      # Length matters, so that the order of mean and normalisation shows.
      rows.append(np.mean(found, axis=0) * len(words) / 255)
    return np.asarray(rows, np.float32)

  def protocol(self):
    return {"encoder": "colours", "weights": "student"}
