"""Model read from files: spec, parameters, preprocessing, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from mtv_jax.config.origin import Origin
from mtv_jax.convert import processors
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.models import positions
from mtv_jax.models.heads import PredictionHead
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.resampling import resize_matrix

# Loss of the image-text contrast: SigLIP's sigmoid or CLIP's softmax.
LossType = Literal["sigmoid", "softmax"]


@dataclasses.dataclass(frozen=True)
class ConvertedModel:
  """A model as NumPy arrays.

  Attributes:
    spec: architecture of the towers.
    params: nested dict: `image`, and optionally `text` and `heads`.
    preprocess: fields of `mtv_jax.encoder.preprocess.Preprocess`.
    tokenizer: tokenizer files, if any.
    prediction_heads: configurations of prediction heads by name.
    weights: the run's weights: student, teacher or ema.
    origin: where the weights come from; None: not recorded.
  """

  spec: ModelSpec
  params: Mapping[str, Any]
  preprocess: Mapping[str, Any]
  tokenizer: TokenizerFiles | None = None
  prediction_heads: Mapping[str, PredictionHead] = dataclasses.field(
    default_factory=dict
  )
  weights: str = "student"
  origin: Origin | None = None

  def store_positions(self) -> ConvertedModel:
    """Stores fixed position embeddings as parameters."""
    tower = self.spec.image
    if tower.positions != "sincos":
      return self
    table = positions.sincos_positions((tower.grid, tower.grid), tower.width)
    return self._replace_image({"positions": "learned"}, table)

  def _replace_image(
    self,
    fields: Mapping[str, Any],
    table: np.ndarray | None = None,
    **leaves: Any,
  ) -> ConvertedModel:
    """Changes fields of the image tower, its positions, and other leaves."""
    if table is not None:
      leaves["position_embedding"] = table
    tower = dataclasses.replace(self.spec.image, **fields)
    return dataclasses.replace(
      self,
      spec=dataclasses.replace(self.spec, image=tower),
      params={**self.params, "image": {**self.params["image"], **leaves}},
    )

  def add_neutral_params(self, kinds: Collection[str]) -> ConvertedModel:
    """Adds missing parameters that don't change outputs.

    `kinds` selects from 'layer_scale' (ones) and 'mask_token' (zeros).
    """
    tower, fields, leaves = self.spec.image, {}, {}
    if "layer_scale" in kinds and tower.layer_scale is None:
      fields["layer_scale"] = 1.0
      ones = np.ones((tower.depth, tower.width), np.float32)
      blocks = self.params["image"]["blocks"]
      leaves["blocks"] = {**blocks, "scale1": ones, "scale2": ones}
    if "mask_token" in kinds and not tower.mask_token:
      fields["mask_token"] = True
      leaves["mask_token"] = np.zeros(tower.width, np.float32)
    return self._replace_image(fields, **leaves)

  def resize(self, image_size: int) -> ConvertedModel:
    """Adapts the model to another image size in pixels.

    Stores the position embedding resampled as the tower does at run time.
    """
    tower = self.spec.image
    rows, columns = tower.grid_of(image_size, image_size)
    if rows != tower.grid and tower.positions == "sincos":
      return self.store_positions().resize(image_size)
    table, old_grid = None, tower.grid
    # Rotary positions lack parameters.
    if rows != old_grid and "learned" in tower.positions:
      table = np.asarray(self.params["image"]["position_embedding"], np.float64)
      table = table.reshape(old_grid, old_grid, tower.width)
      matrix = resize_matrix(old_grid, rows, tower.position_resize)
      table = np.einsum("yh,xw,hwd->yxd", matrix, matrix, table, optimize=True)
      table = table.reshape(rows * columns, tower.width).astype(np.float32)
    resized = self._replace_image({"image_size": image_size}, table)
    preprocess = processors.resize(self.preprocess, image_size)
    return dataclasses.replace(resized, preprocess=preprocess)
