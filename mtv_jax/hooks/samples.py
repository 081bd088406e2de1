"""Samples of the training data in a run's folder, for its report."""

import json
import logging
import pathlib
from typing import Any

import cv2
import jax
import numpy as np
import PIL.Image

from mtv_jax.data import pipeline
from mtv_jax.evals.core.examples import subsample
from mtv_jax.train.describe import find_labelled
from mtv_jax.train.hooks import Hook
from mtv_jax.train.run import Run
from mtv_jax.utils import atomic, plots

log = logging.getLogger(__name__)

NUM_SAMPLES = 6


class Samples(Hook):
  """Writes samples of a run's first batch to its folder."""

  def __init__(self):
    self.is_due = jax.process_index() == 0

  def on_batch(self, run: Run, batch: pipeline.Batch) -> None:
    folder = run.workdir / "samples"
    if not self.is_due:
      return
    self.is_due = False
    if "image" not in batch or (folder / "samples.json").exists():
      return
    try:
      write_samples(folder, batch, run.tokenizer)
    except Exception as error:  # The run does not need them.
      log.warning("Could not write samples to %s: %r", folder, error)


def write_samples(
  folder: pathlib.Path, batch: pipeline.Batch, tokenizer: Any
) -> None:
  """Draws images of a batch with the texts and labels that the model reads.

  `FOLDER/I.png` is an image with its boxes, in its own aspect ratio, beside its
  depth. FOLDER/samples.json has the captions of these `NUM_SAMPLES` evenly
  spaced rows, and the numbers of rows and of rows with each label.
  """
  folder.mkdir(exist_ok=True)
  rows = len(batch["image"])
  labelled = find_labelled(batch)
  captions = []
  for i, row in enumerate(subsample(range(rows), NUM_SAMPLES)):
    image = _draw_sample({k: v[row] for k, v in batch.items()}, tokenizer)
    plots.save_image(image, folder / f"{i}.png")
    captions.append("")
    if "captions" in labelled and labelled["captions"][row]:
      (captions[-1],) = tokenizer.decode(batch["caption"][[row]].tolist())
  counts = {kind: int(mask.sum()) for kind, mask in labelled.items()}
  content = {"rows": rows, "labelled": counts, "captions": captions}
  # Last: it marks the images as complete.
  atomic.write_text(folder / "samples.json", json.dumps(content, indent=1))


def _draw_sample(row: pipeline.Batch, tokenizer: Any) -> np.ndarray:
  """An image with its boxes, beside its depth; stripes are unlabelled."""
  image = row["image"]
  height, width = row.get("image_size", image.shape[:2])
  if image.shape[-1] != 3:
    image = image[..., :1].repeat(3, -1)
  scale = plots.THIRD / max(height, width)
  size = [max(1, round(side * scale)) for side in (width, height)]
  image = np.asarray(PIL.Image.fromarray(image).resize(size))
  if "boxes" in row:
    valid_boxes = np.flatnonzero(row["box_valid"])
    phrases = tokenizer.decode(row["box_phrase"][valid_boxes].tolist())
    image, _ = plots.draw_boxes(image, row["boxes"][valid_boxes], phrases)
  if (depth := row.get("depth")) is None or not depth.any():
    return image
  # Nearest neighbour: interpolated values are not labels.
  depth = cv2.resize(depth, size, interpolation=cv2.INTER_NEAREST)
  colours = plots.colour_depth(depth.astype(np.float32), valid=depth > 0)
  return plots.hstack([image, plots.hatch(colours, depth == 0)])
