"""Zero-shot segmentation: the class with the prompts nearest to a patch.

TIPSv2's protocol for ADE20K's 150 classes (Cao et al. 2026): images of short
side 448, bicubic, windows of 448 every 336 pixels; cosines of patches and
class vectors, upsampled to the window, their softmax averaged where windows
overlap, resized to the image; mIoU over classes with a union. Nothing is
trained. TIPSv2-L has 25.1.

`patch_text` embeds patches in the space of the texts. Of scenes, only the
objects are scored: no caption names their background or ground by a word that
would be a prompt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification.zero_shot import text_classifier
from mtv_jax.evals.core import prompts
from mtv_jax.evals.core.base import Result, require_text
from mtv_jax.evals.core.examples import SegmentationSet
from mtv_jax.evals.datasets import registry, scenes
from mtv_jax.evals.segmentation import metrics as metrics_lib
from mtv_jax.evals.segmentation import patch_text, sliding_window
from mtv_jax.evals.segmentation.base import SegmentationEvaluator
from mtv_jax.models import pooling
from mtv_jax.utils.errors import InputError

_SIZE, _STRIDE = 448, 336


@dataclasses.dataclass(frozen=True)
class ZeroShotSegmentation(SegmentationEvaluator):
  """Zero-shot segmentation by patch-text similarity: mIoU, mAcc and aAcc.

  The published `size` is 448 and the default `stride` three quarters of it.

  Attributes:
    prompts: a file of class names, in the order of the labels, and templates
      (see `prompts.py`; TIPSv2 uses nine of TCL's); by default the data's own
      names and a few templates.
    clean: how prompts are cleaned, see `classification.zero_shot`.
    last_block: `attention` or `values`, see `patch_text`; by default
      `attention` for encoders that pool by attention, `values` for others.
    average: what is averaged where windows overlap, the `softmax` of the
      cosines or the `scores` themselves.
  """

  requires = frozenset({"text"})

  prompts: str | None = None
  clean: Literal["tokenizer", "canonicalize"] = "tokenizer"
  last_block: Literal["attention", "values"] | None = None
  average: Literal["softmax", "scores"] = "softmax"

  @functools.cached_property
  def _set(self) -> tuple[SegmentationSet, prompts.Prompts]:
    data = registry.open_segmentation(self.data, split="test", count=self.count)
    if data.kind == "scenes":
      data = scenes.ignore_stuff(data)
    if self.prompts:
      return data, prompts.read_prompts(self.prompts, classes=data.class_count)
    if data.classes is None:
      raise InputError(
        f"{data.name} has no names of classes (objectInfo150.txt is missing); "
        "give a prompt file (prompts=) with its classes in order"
      )
    return data, prompts.Prompts(classes=data.classes)

  def run(self, encoder: Encoder) -> Result:
    """Metrics of the class with the largest cosine."""
    require_text(encoder)
    data, named = self._set
    last_block = self.last_block or patch_text.default_last_block(encoder)
    patch_text.check(encoder, last_block)
    slide = self._slide(encoder)
    classifier = text_classifier(encoder.text, named, clean=self.clean)

    def score(windows: list[np.ndarray]) -> np.ndarray:
      patches = patch_text.embed_patches(
        encoder, windows, last_block=last_block, batch_size=self.encode_batch
      )
      return (normalize(patches) @ classifier.T)[..., None, :]

    predictions = self._predict(encoder, score, data, slide)
    sums = predictions.sums[:, 0]
    estimate = metrics_lib.estimate(sums)
    pooled = encoder.spec.image.pool in pooling.KINDS
    protocol = {
      **self._common_protocol(encoder, data, slide),
      **named.protocol(),
      "clean": self.clean,
      "tokens": "patches",
      "layer": "last",
      "last_block": last_block,
      "text_space": "attention pooling of the patch alone"
      if pooled
      else "final norm and projection of the patch",
      "similarity": "cosine, float32",
    }
    return Result(
      estimate.metrics,
      protocol,
      metrics_lib.chance(sums.sum(axis=0)),
      errors=estimate.errors,
      resamples=estimate.resamples,
      sheets=predictions.sheets("zero_shot_segmentation"),
    )

  def _slide(self, encoder: Encoder) -> sliding_window.Slide:
    size = self._window_size(encoder, _SIZE)
    return sliding_window.Slide(
      size=size,
      stride=self.stride or max(1, size * _STRIDE // _SIZE),
      short=size,
      rounding="down",
      interpolation="bicubic",
      average=self.average,
    )
