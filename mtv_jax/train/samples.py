"""Samples of the training data in a run's folder, for its report."""

import json
import pathlib
from typing import Any

import numpy as np
import PIL.Image

from mtv_jax.data import pipeline
from mtv_jax.evals.core.examples import subsample
from mtv_jax.utils import atomic

# Images, and their longer side at most, in pixels.
NUM_SAMPLES, SAMPLE_SIZE = 6, 256


def write_samples(
  folder: pathlib.Path, batch: pipeline.Batch, tokenizer: Any
) -> None:
  """Writes images of a batch with the texts and labels that the model reads.

  FOLDER/samples.json has the captions and boxes of `NUM_SAMPLES` evenly spaced
  rows, and the number of rows with each label. `I.jpg` is an image in its own
  aspect ratio, `I_depth.png` its inverse depth; 0 is unlabelled.
  """
  folder.mkdir(exist_ok=True)
  rows = len(batch["image"])
  valid = {name: batch.get(f"{name}_valid") for name in ("caption", "box")}
  if (depth := batch.get("depth")) is not None:
    valid["depth"] = depth > 0
  has = {k: v.reshape(rows, -1) for k, v in valid.items() if v is not None}
  samples = []
  for i, row in enumerate(subsample(range(rows), NUM_SAMPLES)):
    image = batch["image"][row]
    size = batch["image_size"][row] if "image_size" in batch else image.shape
    size = np.asarray(size[:2])
    image = image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1)
    scale = min(1.0, SAMPLE_SIZE / size.max())
    shape = np.maximum(np.rint(size[::-1] * scale), 1).astype(int).tolist()
    image = PIL.Image.fromarray(image).resize(shape)
    image.save(folder / f"{i}.jpg", quality=85)
    sample = {"size": size.tolist()}
    if "caption" in has and has["caption"][row].any():
      (sample["caption"],) = tokenizer.decode([batch["caption"][row]])
    if "box" in has:
      kept = np.flatnonzero(has["box"][row])
      sample["boxes"] = batch["boxes"][row][kept].tolist()
      sample["phrases"] = tokenizer.decode(batch["box_phrase"][row][kept])
    if "depth" in has and has["depth"][row].any():
      pixels = (depth[row] / 257.0).clip(depth[row] > 0).astype(np.uint8)
      PIL.Image.fromarray(pixels).save(folder / f"{i}_depth.png")
    samples.append(sample)
  labelled = {name: int(x.any(axis=1).sum()) for name, x in has.items()}
  content = {"rows": rows, "labelled": labelled, "samples": samples}
  # Last: it marks the images as complete.
  atomic.write_text(folder / "samples.json", json.dumps(content, indent=1))
