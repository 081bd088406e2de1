"""Feature expert: stores an encoder's features for `feature_distillation`.

Supports any encoder that `mtv_jax.load` reads. Images are squashed to a canvas
and resized on the device, as in training.
"""

import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from mtv_jax.augment import views as views_lib
from mtv_jax.config.feature_layout import Format
from mtv_jax.config.options import PositiveInt
from mtv_jax.data import canvas as canvas_lib
from mtv_jax.data.labels.label_values import (
  FeatureLabel,
  LabelOutcome,
  Quantized,
  no_label,
)
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns, loading
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import block_index
from mtv_jax.experts import base
from mtv_jax.experts.base import Arrays, Image, PreparedInput, check_options
from mtv_jax.models import two_tower
from mtv_jax.utils.tree import fingerprint


class FeatureExpert:
  """Labels images with an encoder's pooled and patch features.

  The encoder's mesh must be local to this host. Inputs have `size` pixels per
  side, resized from a canvas of `canvas` pixels, as in training; the encoder's
  preprocessing sets only mean and standard deviation. `layers` are the blocks
  whose patch tokens are stored; () stores the final patch tokens.
  """

  kind = "features"

  def __init__(
    self,
    encoder: Encoder,
    *,
    size: int,
    canvas: int,
    layers: tuple[int, ...],
    format: Format,
    batch_size: int,
  ):
    self._mesh, self._canvas, self._format = encoder.mesh, canvas, format
    params = {"image": encoder.params["image"]}
    protocol = encoder.protocol()
    self.rows = batch_size * encoder.mesh.size
    self.settings = {
      "expert": "encoder",
      "hash": fingerprint(params),
      **{key: protocol[key] for key in ("weights", "dtype", "preprocess")},
      "size": size,
      "canvas": canvas,
      "layers": list(layers),
      "format": format,
      "batch_size": batch_size,
    }
    self._params = base.replicate(params["image"], encoder.mesh)
    function = make_feature_function(encoder, size, layers)
    self._function = base.jit_per_device(function, encoder.mesh)

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Squashes an image to the canvas."""
    del record
    size = np.array(image.shape[:2], np.int32)
    pixels = canvas_lib.squash(image, self._canvas)
    return PreparedInput(None, {"image": pixels, "image_size": size})

  def run(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Returns `pooled` `[rows, 1, e]`, `patches` or `layerI` `[rows, p, d]`."""
    return self._function(self._params, base.shard(arrays, self._mesh))

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Quantizes one image's features; no label unless they are finite."""
    del meta
    if not all(np.isfinite(x).all() for x in outputs.values()):
      return no_label("features: NaN or infinite")
    arrays = {n: Quantized.of(x, self._format) for n, x in outputs.items()}
    return LabelOutcome(FeatureLabel(arrays, self._format))


def make_feature_function(
  encoder: Encoder, size: int, layers: tuple[int, ...]
) -> apply_fns.Function:
  """Builds a function from canvases to float32 features, as in training."""
  spec, preprocess = encoder.spec, encoder.preprocess
  views = views_lib.build_views(
    {"image": dict(ops=f"resize({size})")},
    mean=preprocess.mean,
    std=preprocess.std,
  )
  dtype = jnp.dtype(encoder.dtype)
  tower = two_tower.image_tower(spec, dtype=dtype)

  def run(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(batch["image"]))
    view = views["image"](batch["image"], batch["image_size"], keys, dtype)
    with apply_fns.precision(encoder.dtype):
      out = tower.apply({"params": params}, view.images[:, 0], layers=layers)
    features = {
      f"layer{i}": out.intermediates[i][:, spec.image.prefix :] for i in layers
    }
    features = features or {"patches": out.patches}
    features["pooled"] = out.pooled[:, None]
    return {n: x.astype(jnp.float32) for n, x in features.items()}

  return run


@check_options
def load_expert(
  folder: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  batch_size: PositiveInt | None = None,
  dtype: str | None = None,
  weights: Literal["student", "teacher", "ema"] | None = None,
  step: int | None = None,
  size: PositiveInt | None = None,
  canvas: PositiveInt | None = None,
  layers: tuple[int, ...] = (),
  format: Format = "float8",
) -> FeatureExpert:
  """Opens an encoder as a feature expert.

  Args:
    folder: see `loading.load`.
    mesh, batch_size, dtype: see `base.fill_defaults`.
    weights, step: weights and checkpoint of a run, see `loading.load`.
    size: input size in pixels; default: the encoder's.
    canvas: size of the run's `canvas` op in pixels; default: `size`.
    layers: blocks whose patch tokens are stored, -1 for the last; default: the
      final patch tokens.
    format: `float8` or `int8`.
  """
  mesh, dtype, batch_size = base.fill_defaults(mesh, dtype, batch_size)
  encoder = loading.load(
    folder, dtype=dtype, mesh=mesh, weights=weights, step=step
  )
  image = encoder.spec.image
  size = size or encoder.preprocess.size
  image.grid_of(size, size)
  return FeatureExpert(
    encoder,
    size=size,
    canvas=canvas or size,
    layers=tuple(sorted({block_index(i, image.depth) for i in layers})),
    format=format,
    batch_size=batch_size,
  )
