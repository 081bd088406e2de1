"""Zero-shot segmentation: the class whose prompts a patch is nearest to.

TIPSv2's protocol for ADE20K's 150 classes (Cao et al. 2026): images of short
side 448, bicubic, windows of 448 every 336 pixels; cosines of patches and
class vectors, enlarged to the window, their softmax averaged where windows
overlap, brought to the image's size; mIoU over classes with a union. Nothing
is trained. TIPSv2-L has 25.1.

How a patch gets into the space of texts is `patch_text`'s matter. Of scenes,
only things are judged: no caption names their background or ground by a word
that would be a prompt.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from mtv_jax.encoder.encoder import Encoder, normalize
from mtv_jax.evals.classification.zero_shot import text_classifier
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.base import Evaluator, Result, require_text
from mtv_jax.evals.core.examples import Data, SegmentationSet
from mtv_jax.evals.datasets import registry
from mtv_jax.evals.datasets.scenes import ignore_stuff, is_scenes
from mtv_jax.evals.segmentation import metrics as segmentation_metrics
from mtv_jax.evals.segmentation import (
  patch_text,
  sliding,
)
from mtv_jax.evals.segmentation import (
  runs as segmentation_runs,
)
from mtv_jax.utils.errors import did_you_mean

_SIZE, _STRIDE = 448, 336


@dataclasses.dataclass(frozen=True)
class ZeroShotSegmentation(Evaluator):
  """Zero-shot segmentation from patch-text similarity.

  None means the published value on real data and a small one on scenes.

  Attributes:
    data: see `datasets/registry.py`.
    prompts: a file of class names, in the order of the labels, and templates
      (see `prompts.py`; TIPSv2 uses nine of TCL's); by default the data's own
      names and a few templates.
    clean: of prompts, see `zero_shot.py`.
    last_block: `attention` or `values`, see `patch_text.py`; by default
      `attention` for encoders that pool by attention, `values` for others.
    size: side of windows and shorter side of images: 448, or the next that the
      patch divides; for scenes the encoder's own.
    stride: pixels between windows: three quarters of `size`.
    average: what is averaged where windows overlap, the `softmax` of the
      cosines or the `scores` themselves.
    count: images, evenly spaced; all by default.
    encode_batch: windows that are encoded at a time.
    pictures: images on the sheet.
  """

  data: Data = "scenes"
  prompts: str | None = None
  clean: str = "tokenizer"
  last_block: str | None = None
  size: int | None = None
  stride: int | None = None
  average: str = "softmax"
  count: int | None = None
  encode_batch: int = 16
  pictures: int = 0

  def __post_init__(self):
    known = {
      "last_block": (None, *patch_text.LAST_BLOCKS),
      "average": sliding.AVERAGES,
      "clean": ("tokenizer", "canonicalize"),
    }
    for field, choices in known.items():
      if (value := getattr(self, field)) not in choices:
        names = [c for c in choices if c]
        raise ValueError(
          f"zero_shot_segmentation: {field}={value!r}. "
          f"{did_you_mean(str(value), names)}"
        )

  @functools.cached_property
  def _set(self) -> tuple[SegmentationSet, prompts.Prompts]:
    data = registry.open_segmentation(self.data, split="test", count=self.count)
    if data.kind == "scenes":
      data = ignore_stuff(data)
    return data, _prompts(data, self.prompts)

  def prepare(self) -> None:
    """Lists the images and reads the prompts."""
    _ = self._set

  def run(self, encoder: Encoder) -> Result:
    """mIoU, mAcc and aAcc of the nearest class."""
    require_text(encoder)
    data, named = self._set
    last_block = self.last_block or patch_text.default_last_block(encoder)
    patch_text.check(encoder, last_block)
    slide = self._slide(encoder)
    classifier = text_classifier(encoder, named, clean=self.clean)

    def score(windows: list[np.ndarray]) -> np.ndarray:
      found = patch_text.patches(
        encoder, windows, last_block=last_block, batch_size=self.encode_batch
      )
      return (normalize(found) @ classifier.T)[..., None, :]

    found = segmentation_runs.evaluate(
      score,
      data,
      slide,
      fill=segmentation_runs.fill_of(encoder),
      batch_size=self.encode_batch,
      pictures=self.pictures,
    )
    scores = segmentation_metrics.scores(found.counts[0])
    metrics = {k: getattr(scores, k) for k in ("miou", "macc", "aacc")}
    protocol = {
      **segmentation_runs.protocol(encoder, data, slide),
      "prompts": named.name,
      "prompts_hash": named.digest,
      "templates": list(named.templates),
      "clean": self.clean,
      "tokens": "patches",
      "layer": "last",
      "last_block": last_block,
      "text_space": _SPACES[encoder.spec.image.pool],
      "similarity": "cosine, float32",
    }
    chance = segmentation_metrics.chance(found.counts[0])
    pictures = found.pictures("zero_shot_segmentation", data)
    return Result(metrics, protocol, chance, pictures=pictures)

  def _slide(self, encoder: Encoder) -> sliding.Slide:
    scenes = is_scenes(self.data)
    default = encoder.preprocess.size if scenes else _SIZE
    size = segmentation_runs.window_size(encoder, self.size, default=default)
    return sliding.Slide(
      size=size,
      stride=self.stride or max(1, size * _STRIDE // _SIZE),
      short=size,
      interpolation="bicubic",
      average=self.average,
    )


_SPACES = {
  "map": "attention pooling of the patch alone",
  "cls": "final norm and projection of the patch",
  "mean": "final norm and projection of the patch",
}


def _prompts(data: SegmentationSet, path: str | None) -> prompts.Prompts:
  if path is None:
    if data.classes is None:
      raise ValueError(
        f"{data.name} has no names of classes (objectInfo150.txt is missing): "
        "give a prompt file (prompts=) with its classes in order"
      )
    return prompts.Prompts(classes=data.classes)
  named = prompts.read_prompts(path)
  if len(named.classes) != data.class_count:
    raise ValueError(
      f"{named.name} has {len(named.classes)} classes and {data.name} "
      f"{data.class_count}; they are matched in order"
    )
  return named
