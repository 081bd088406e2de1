"""A model read from files: spec, parameters, preprocessing, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtv_jax.convert import processors
from mtv_jax.models import positions
from mtv_jax.models.heads import PredictionHead
from mtv_jax.models.two_tower import ModelSpec


@dataclasses.dataclass(frozen=True)
class Converted:
  """A model from files.

  Attributes:
    spec: its shape.
    params: nested dict of NumPy arrays: `image`, and maybe `text` and `heads`.
    preprocess: fields of `mtv_jax.encoder.preprocess.Preprocess`.
    tokenizer: where its tokenizer is, None if there is none.
    prediction_heads: configuration of the heads that predict, by name.
  """

  spec: ModelSpec
  params: dict[str, Any]
  preprocess: dict[str, Any]
  tokenizer: processors.TokenizerFiles | None = None
  prediction_heads: Mapping[str, PredictionHead] = dataclasses.field(
    default_factory=dict
  )

  def resized(self, image_size: int) -> Converted:
    """The same model for images of another size."""
    params, spec = resize_positions(self.params, self.spec, image_size)
    return dataclasses.replace(
      self,
      spec=spec,
      params=params,
      preprocess=processors.resized(self.preprocess, image_size),
    )


def resize_positions(
  params: Mapping[str, Any], spec: ModelSpec, image_size: int
) -> tuple[dict[str, Any], ModelSpec]:
  """Resamples the image tower's position embedding for good.

  The tower does the same on the fly for images of another size; a training run
  or an export at that size wants it stored.

  Args:
    params: with `image/position_embedding`.
    spec: of the model.
    image_size: in pixels; the patch must divide it.

  Returns:
    The parameters with a new position embedding (the rest is shared), and the
    spec that says so.

  Raises:
    ValueError: the patch doesn't divide the size.
  """
  rows, columns = spec.image.grid_of(image_size, image_size)
  image = dataclasses.replace(spec.image, image_size=image_size)
  if rows == spec.image.grid:
    return dict(params), dataclasses.replace(spec, image=image)
  old, width = spec.image.grid, spec.image.width
  table = np.asarray(params["image"]["position_embedding"], np.float64)
  matrix = positions.resize_matrix(old, rows, spec.image.position_resize)
  grid = np.einsum(
    "yh,xw,hwd->yxd",
    matrix,
    matrix,
    table.reshape(old, old, width),
    optimize=True,
  )
  resampled = grid.reshape(rows * columns, width).astype(np.float32)
  tower = {**params["image"], "position_embedding": resampled}
  return {**params, "image": tower}, dataclasses.replace(spec, image=image)
