"""Base class of the correspondence evaluations: inputs and patch features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

from mtv_jax.config.options import NonNegativeInt, PositiveInt
from mtv_jax.encoder.encoder import Encoder, block_index
from mtv_jax.evals.core import dense
from mtv_jax.evals.core.base import Evaluator, preprocess_protocol
from mtv_jax.evals.core.examples import Data
from mtv_jax.utils.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CorrespondenceEvaluator(Evaluator):
  """Base class of the correspondence evaluations.

  Attributes:
    data: see `datasets/registry.py`.
    size: side of the encoded square; the published one, or the one with the
      same grid where the patch does not divide it.
    layer: block whose patch tokens are matched; -1 is the last.
    norm: `none` takes them before the final norm, `final` after it.
  """

  data: Data = "scenes"
  size: PositiveInt | None = None
  layer: int = -1
  norm: Literal["none", "final"] = "none"
  batch_size: PositiveInt = 16
  pictures: NonNegativeInt = 0  # Pairs on the sheet.

  def _input_size(self, encoder: Encoder, published: int) -> int:
    """Side of the input: `size`, or the published one for this patch size.

    Published sizes are for patches of 16. Where the patch does not divide them,
    the grid stays equal rather than the pixels, as in DINOv3's evaluations (448
    with patches of 14 for NAVI's 512).

    Raises:
      InputError: for a size that the patch does not divide.
    """
    image, size = encoder.spec.image, self.size
    if size is None:
      whole = published % image.patch_size == 0
      return published if whole else published // 16 * image.patch_size
    image.grid_of(size, size)
    return size

  def _features(
    self, encoder: Encoder, images: Sequence[np.ndarray]
  ) -> Float32[np.ndarray, "n h w d"]:
    """Patch tokens of images of one size.

    Raises:
      ConfigError: for the final norm of another block than the last.
    """
    depth = encoder.spec.image.depth
    block = block_index(self.layer, depth)
    if self.norm == "final" and block != depth - 1:
      raise ConfigError(
        f"norm='final' with layer={self.layer}: the final norm follows the "
        f"last block only, -1 or {depth - 1}; use norm='none'"
      )
    return dense.features(
      encoder, images, (block,), norm=self.norm, batch_size=self.batch_size
    )

  def _common_protocol(
    self, encoder: Encoder, size: int, **steps: str
  ) -> dict[str, Any]:
    """Protocol entries; `steps` are `crop` and `interpolation`."""
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
