"""Depth expert for any model that predicts inverse depth."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt8

from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.experts import local_mesh
from mtv_jax.experts.base import PreparedInput


class DepthExpert:
  """Labels images with the inverse depth of a model.

  `function` maps `params` and `images` `[n, h, w, 3]` to inverse `depth`
  `[n, h, w]`, with an arbitrary scale per image. `preprocess` maps an image to
  the model's input; inputs of equal shape share a batch. Labels are `side` x
  `side` pixels; `batch_size` is images per device.
  """

  kind = "depth"

  def __init__(
    self,
    function: Callable[[PyTree, PyTree], dict[str, jax.Array]],
    params: PyTree,
    preprocess: Callable[[np.ndarray], np.ndarray],
    *,
    mesh: Mesh,
    batch_size: int,
    side: int,
    settings: Mapping[str, Any],
  ):
    self.rows = batch_size * mesh.size
    self.settings = {**settings, "batch_size": batch_size, "side": side}
    self._mesh, self._preprocess, self._side = mesh, preprocess, side
    self._params = local_mesh.replicate(params, mesh)
    self._function = local_mesh.jit_per_device(function, mesh)

  def prepare(
    self, image: UInt8[np.ndarray, "h w 3"], record: Record
  ) -> PreparedInput:
    """Preprocesses an image."""
    del record
    pixels = self._preprocess(image)
    return PreparedInput(pixels.shape[:2], {"images": pixels})

  def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Predicts inverse `depth` `[rows, h, w]`."""
    return self._function(self._params, local_mesh.shard(arrays, self._mesh))

  def finish(
    self, outputs: Mapping[str, np.ndarray], meta: Any
  ) -> LabelOutcome:
    """The label of one image: its depth map, averaged to the label size."""
    del meta
    return label_values.make_depth(outputs["depth"], side=self._side)
