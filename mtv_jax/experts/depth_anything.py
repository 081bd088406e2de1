"""Depth expert: Depth Anything V2 (Yang et al. 2024), or a similar model."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, PyTree, UInt8

from mtv_jax.config.options import PositiveInt, Range
from mtv_jax.convert import depth_anything, processors
from mtv_jax.convert.depth_anything import DepthSpec
from mtv_jax.data import canvas
from mtv_jax.data.labels import label_values
from mtv_jax.data.labels.label_values import LabelOutcome
from mtv_jax.data.records import Record
from mtv_jax.encoder import apply_fns
from mtv_jax.encoder.preprocess import lower_bound_shape
from mtv_jax.experts import base
from mtv_jax.experts.base import Arrays, Image, PreparedInput, check_options
from mtv_jax.models import layers, vit
from mtv_jax.utils.errors import InputError, check_choice
from mtv_jax.utils.tree import fingerprint

_PREPROCESSES = ("original", "square")
MEAN = np.float32(processors.IMAGENET_MEAN)
STD = np.float32(processors.IMAGENET_STD)


@dataclasses.dataclass(frozen=True)
class DepthPreprocess:
  """Resizes and normalises images:

  original  as the official code: shorter side to at least `size`, bicubic on
            floats, four neighbours per dimension at any scale
  square    whole image squashed to `size` x `size`, antialiased; all images
            share a shape, and labels are in the unit square anyway

  `original` preserves the aspect ratio up to a `multiple` (the patch) and
  compiles one program per image shape. `max_aspect`, longer side over shorter,
  bounds the number of shapes: 75 at size 518 and aspect 2. Unlike the official
  code, squeezes more elongated images.
  """

  preprocess: str = "original"
  size: int = 518
  multiple: int = 14
  max_aspect: float | int = 2.0

  def __post_init__(self):
    check_choice("preprocess", self.preprocess, _PREPROCESSES)
    if self.size < self.multiple or self.size % self.multiple:
      nearest = max(1, round(self.size / self.multiple)) * self.multiple
      raise InputError(
        f"size={self.size} is not a multiple of the patch, {self.multiple}; "
        f"the nearest is {nearest}."
      )
    if self.max_aspect < 1:
      raise InputError(f"max_aspect={self.max_aspect}; expected at least 1.")

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"]
  ) -> Float32[np.ndarray, "h2 w2 3"]:
    """Resizes and normalises an image."""
    if self.preprocess == "square":
      pixels = canvas.squash(image, self.size).astype(np.float32)
      return (pixels - MEAN * 255) / (STD * 255)
    shape = self.resized_shape(*image.shape[:2])
    pixels = image.astype(np.float32) / 255
    pixels = cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (pixels - MEAN) / STD

  def resized_shape(self, height: int, width: int) -> tuple[int, int]:
    """Height and width of a preprocessed image, in pixels."""
    if self.preprocess == "square":
      return self.size, self.size
    rows, columns = lower_bound_shape(
      height, width, size=self.size, multiple=self.multiple
    )
    return self._bound_side(rows, columns), self._bound_side(columns, rows)

  def _bound_side(self, side: int, other: int) -> int:
    limit = int(self.max_aspect * other) // self.multiple * self.multiple
    return min(side, max(limit, self.multiple))


class DepthExpert:
  """Labels images with the inverse depth that a model predicts.

  `function` maps `params` and `images` `[n, h, w, 3]` to inverse `depth`
  `[n, h, w]`, with an arbitrary scale per image. `preprocess` maps an image to
  the model's input; inputs of equal shape share a batch. Labels are `side` x
  `side` pixels of `bits`; `batch_size` is images per device.
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
    bits: int,
    settings: Mapping[str, Any],
  ):
    self.rows = batch_size * mesh.size
    self._label_size = {"side": side, "bits": bits}
    self.settings = {
      **settings,
      "batch_size": batch_size,
      **label_values.depth_settings(self._label_size),
    }
    self._mesh, self._preprocess = mesh, preprocess
    self._params = base.replicate(params, mesh)
    self._function = base.jit_per_device(function, mesh)

  def prepare(self, image: Image, record: Record) -> PreparedInput:
    """Preprocesses an image."""
    del record
    pixels = self._preprocess(image)
    return PreparedInput(pixels.shape[:2], {"images": pixels})

  def run(self, arrays: Arrays) -> dict[str, jax.Array]:
    """Predicts inverse `depth` `[rows, h, w]`."""
    return self._function(self._params, base.shard(arrays, self._mesh))

  def finish(self, outputs: Arrays, meta: Any) -> LabelOutcome:
    """Averages the depth map of one image to the label size."""
    del meta
    return label_values.make_depth(outputs["depth"], **self._label_size)


@check_options
def load_expert(
  path: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  batch_size: PositiveInt | None = None,
  dtype: Literal["float32", "bfloat16"] | None = None,
  preprocess: str | None = None,
  size: int = 518,
  side: Annotated[int, Range(min=label_values.MIN_SIDE)] = label_values.SIDE,
  bits: label_values.Bits = label_values.BITS,
  max_aspect: float = 2.0,
) -> DepthExpert:
  """Opens a Depth Anything V2 folder of `transformers` as a depth expert.

  Args:
    path: folder with `config.json` and `model.safetensors`, such as
      Depth-Anything-V2-Small-hf.
    mesh, batch_size, dtype: see `base.fill_defaults`.
    preprocess, size, max_aspect: see `DepthPreprocess`. The default is "square"
      on accelerators, which compiles only one program, else "original".
    side, bits: side of a label in pixels, and bits of a pixel.
  """
  spec, params = depth_anything.read(path)
  mesh, dtype, batch_size = base.fill_defaults(mesh, dtype, batch_size)
  if preprocess is None:
    preprocess = "square" if base.is_accelerator(mesh) else "original"
  prepare = DepthPreprocess(preprocess, size, spec.image.patch_size, max_aspect)
  return DepthExpert(
    make_function(spec, dtype=dtype, mesh=mesh),
    params,
    prepare,
    mesh=mesh,
    batch_size=batch_size,
    side=side,
    bits=bits,
    settings={
      "expert": "depth_anything",
      "hash": fingerprint(params),
      "dtype": dtype,
      "preprocess": preprocess,
      "size": size,
      "max_aspect": max_aspect,
    },
  )


def make_function(
  spec: DepthSpec, *, dtype: str, mesh: Mesh
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
  """Builds a function from params and `images` to float32 `depth` `[n, h, w]`.

  The mesh's platform determines how the head resamples.
  """
  compute_dtype = jnp.dtype(dtype)
  tower = vit.ViT(spec.image, dtype=compute_dtype)
  norm = layers.norm(spec.image.norm_eps, compute_dtype, "norm")
  resize = "products" if base.is_accelerator(mesh) else "neighbours"
  head = spec.head.clone(resize=resize)
  prefix = spec.image.prefix

  def run(params, batch):
    images = batch["images"]
    n, *size = images.shape[:3]
    grid = spec.image.grid_of(*size)
    with apply_fns.precision(dtype):
      out = tower.apply({"params": params["image"]}, images, layers=spec.layers)
      normed = [
        norm.apply({"params": params["image"]["norm"]}, out.intermediates[i])
        for i in spec.layers
      ]
      stages = [x[:, prefix:].reshape(n, *grid, -1) for x in normed]
      depth = head.apply({"params": params["depth"]}, stages, tuple(size))
    return {"depth": depth}

  return run
