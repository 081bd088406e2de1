"""Base class of the correspondence evaluators: inputs and patch features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.convert import processors
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import dense, examples
from mtv_jax.evals.core.base import Evaluator, preprocess_protocol
from mtv_jax.evals.core.dense import PaddedView
from mtv_jax.evals.core.examples import Data
from mtv_jax.utils import plots

_TITLES = ("first image", "second image")


@dataclasses.dataclass(frozen=True)
class CorrespondenceEvaluator(Evaluator):
  """Base class of the correspondence evaluators.

  Attributes:
    size: side of the encoded square; the published size by default.
    fit: how to resize if the patch size doesn't divide the published size.
      `grid` keeps the number of patches of a ViT with patch size 16 (DINOv3:
      448 instead of NAVI's 512 for patch size 14); `pad` pads all sides with
      the mean colour (Probe3D: 512 to 518 and SPair-71k's 800 to 812 for patch
      size 14) and ignores the padding in patch positions, as published.
    image_mean: `encoder`, or `imagenet` for ImageNet's mean and standard
      deviation, which Probe3D uses for every encoder.
    layer: block whose patch tokens are matched; -1 is the last.
    norm: `none` matches tokens before the final norm, `final` after it.
  """

  data: Data = "scenes"
  size: PositiveInt | None = None
  fit: Literal["grid", "pad"] = "grid"
  image_mean: Literal["encoder", "imagenet"] = "encoder"
  layer: int = -1
  norm: Literal["none", "final"] = "none"
  batch_size: PositiveInt = 16
  pictures: NonNegativeInt = 0  # Pairs on the sheet.

  def _input_size(self, encoder: Encoder, published: int) -> int:
    """Side of the square before padding."""
    image, size = encoder.spec.image, self.size
    if self.fit == "pad":
      return size or published
    if size is None:
      is_divisible = published % image.patch_size == 0
      return published if is_divisible else published // 16 * image.patch_size
    image.grid_of(size, size)
    return size

  def _with_image_mean(self, encoder: Encoder) -> Encoder:
    if self.image_mean == "encoder":
      return encoder
    values = {"mean": processors.IMAGENET_MEAN, "std": processors.IMAGENET_STD}
    preprocess = dataclasses.replace(encoder.preprocess, **values)
    return encoder.with_preprocess(preprocess)

  def _padded_view(self, encoder: Encoder, size: int) -> PaddedView:
    patch, mean = encoder.spec.image.patch_size, encoder.preprocess.mean
    return PaddedView((size, size), (size, size), patch, mean=mean)

  def _encode(
    self, encoder: Encoder, images: Sequence[np.ndarray]
  ) -> Float32[np.ndarray, "n h w d"]:
    """Patch tokens of squares of one size, padded to whole patches."""
    image, norm = encoder.spec.image, self.norm
    block = dense.matched_block(self.layer, norm=norm, depth=image.depth)
    size = images[0].shape[0]
    if size % image.patch_size:
      squares, view = images, self._padded_view(encoder, size)
      images = examples.LazySequence(
        lambda i: view.pad(squares[i].astype(np.float32)), len(squares)
      )
    options = {"norm": norm, "batch_size": self.batch_size}
    return dense.features(encoder, images, (block,), **options)

  def _draw_sheets(
    self, rows: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Sheet `matches` with a row per pair; empty without rows."""
    rows = [np.asarray(plots.fit_image(x, plots.SHEET_WIDTH)) for x in rows]
    return {"matches": plots.stack_rows(rows, _TITLES)} if rows else {}

  def _common_protocol(
    self, encoder: Encoder, size: int, **steps: Any
  ) -> dict[str, Any]:
    """Protocol entries; `steps` adds preprocessing steps, such as `crop`."""
    padded = self._padded_view(encoder, size).padded
    steps |= {"padded": list(padded)} if padded != (size, size) else {}
    return {
      **encoder.protocol(),
      "input_size": [size, size],
      "preprocess": preprocess_protocol(
        encoder, resize="squash", size=size, **steps
      ),
      "layer": self.layer,
      "final_norm": self.norm == "final",
      "similarity": "cosine, float32, highest matmul precision",
    }
