"""Model read from files: spec, parameters, preprocessing, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np

from mtv_jax.convert import processors
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
  """

  spec: ModelSpec
  params: Mapping[str, Any]
  preprocess: Mapping[str, Any]
  tokenizer: processors.TokenizerFiles | None = None
  prediction_heads: Mapping[str, PredictionHead] = dataclasses.field(
    default_factory=dict
  )
  weights: str = "student"

  def store_positions(self) -> ConvertedModel:
    """Stores fixed position embeddings as parameters."""
    tower = self.spec.image
    if tower.positions != "sincos":
      return self
    table = positions.sincos_positions((tower.grid, tower.grid), tower.width)
    tower = dataclasses.replace(tower, positions="learned")
    image = {**self.params["image"], "position_embedding": table}
    return dataclasses.replace(
      self,
      spec=dataclasses.replace(self.spec, image=tower),
      params={**self.params, "image": image},
    )

  def add_neutral(self, kinds: Collection[str]) -> ConvertedModel:
    """Adds missing parameters that don't change outputs.

    `kinds` selects from 'layer_scale' (ones) and 'mask_token' (zeros).
    """
    tower, image = self.spec.image, dict(self.params["image"])
    fields: dict[str, Any] = {}
    if "layer_scale" in kinds and tower.layer_scale is None:
      fields["layer_scale"] = 1.0
      ones = np.ones((tower.depth, tower.width), np.float32)
      image["blocks"] = {**image["blocks"], "scale1": ones, "scale2": ones}
    if "mask_token" in kinds and not tower.mask_token:
      fields["mask_token"] = True
      image["mask_token"] = np.zeros(tower.width, np.float32)
    tower = dataclasses.replace(tower, **fields)
    return dataclasses.replace(
      self,
      spec=dataclasses.replace(self.spec, image=tower),
      params={**self.params, "image": image},
    )

  def resize(self, image_size: int) -> ConvertedModel:
    """Adapts the model to another image size in pixels.

    Stores the position embedding resampled as the tower does at run time.
    """
    tower = self.spec.image
    rows, columns = tower.grid_of(image_size, image_size)
    if rows != tower.grid and tower.positions == "sincos":
      return self.store_positions().resize(image_size)
    params = dict(self.params)
    # Rotary positions lack parameters.
    if rows != tower.grid and "learned" in tower.positions:
      old = tower.grid
      table = np.asarray(params["image"]["position_embedding"], np.float64)
      matrix = resize_matrix(old, rows, tower.position_resize)
      grid = np.einsum(
        "yh,xw,hwd->yxd",
        matrix,
        matrix,
        table.reshape(old, old, tower.width),
        optimize=True,
      )
      resampled = grid.reshape(rows * columns, tower.width).astype(np.float32)
      params["image"] = {**params["image"], "position_embedding": resampled}
    tower = dataclasses.replace(tower, image_size=image_size)
    return dataclasses.replace(
      self,
      spec=dataclasses.replace(self.spec, image=tower),
      params=params,
      preprocess=processors.resize(self.preprocess, image_size),
    )
