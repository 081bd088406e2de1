"""DPT head: a dense map from the tokens of four layers, and the depth head.

Ranftl et al. 2021, "Vision Transformers for Dense Prediction", in the form of
Depth Anything (Yang et al. 2024): no readout token, no batch norm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models import layers
from mtv_jax.models import stack as stack_lib
from mtv_jax.models.heads import base
from mtv_jax.models.positions import resize_grid
from mtv_jax.utils.errors import ConfigError, InputError, check_choice
from mtv_jax.utils.resampling import resize_matrix

STAGES = 4
# Largest side of a depth map by default: the depth loss sorts its pixels.
MAX_SIDE = 112

# Depth Anything V2's channels by encoder width: fused maps, then reassembled
# maps from the shallowest stage on.
_SHAPES = {
  384: (64, (48, 96, 192, 384)),
  768: (128, (96, 192, 384, 768)),
  1024: (256, (256, 512, 1024, 1024)),
  1536: (384, (1536,) * 4),
}
_LAYERS = {24: (4, 11, 17, 23)}  # DINOv2's layers; the rule's first would be 5.


def quarter_layers(depth: int) -> tuple[int, int, int, int]:
  """The last layer of each quarter of a tower, rounded up, counted from 0.

  12 layers: 2, 5, 8, 11; 24: DINOv2's 4, 11, 17, 23.
  """
  quarters = [math.ceil(depth * (i + 1) / STAGES) - 1 for i in range(STAGES)]
  return _LAYERS.get(depth, tuple(quarters))


def default_shape(width: int) -> tuple[int, tuple[int, int, int, int]]:
  """Channels of the fused and of the reassembled maps, by encoder width.

  As in Depth Anything V2 for S, B, L and g; otherwise about a sixth of the
  width, and an eighth, a quarter, half and all of it, the pattern of S and B.
  """
  rule = tuple(max(1, width // divisor) for divisor in (8, 4, 2, 1))
  return _SHAPES.get(width, (max(16, width // 48 * 8), rule))


def resize_corners(
  x: Float[Array, "b h w c"], size: tuple[int, int], *, by: str = "products"
) -> Float[Array, "b h2 w2 c"]:
  """Bilinear resampling with aligned corners, in the dtype of `x`.

  `by='products'`: two matrix products, fast on accelerators, as is their
  gradient. `by='neighbours'`: gathers, a hundred times faster on CPUs.
  """
  resize = {"products": _by_products, "neighbours": _by_neighbours}[by]
  for axis in (1, 2):
    if x.shape[axis] != size[axis - 1]:
      x = resize(x, axis, size[axis - 1])
  return x


def _by_products(x: jax.Array, axis: int, size: int) -> jax.Array:
  # By default a TPU multiplies float32 in bfloat16.
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  matrix = resize_matrix(x.shape[axis], size, "bilinear_corners")
  matrix = jnp.asarray(matrix.astype(np.float32), x.dtype)
  equation = {1: "yh,bhwc->bywc", 2: "xw,bhwc->bhxc"}[axis]
  return jnp.einsum(equation, matrix, x, precision=precision)


def _by_neighbours(x: jax.Array, axis: int, size: int) -> jax.Array:
  max_index = x.shape[axis] - 1
  position = np.arange(size) * max_index / max(size - 1, 1)
  low = np.minimum(np.floor(position).astype(int), max_index)
  weight = np.expand_dims(position - low, (*range(1, x.ndim - axis),))
  weight = jnp.asarray(weight, x.dtype)
  below, above = (
    jnp.take(x, i, axis=axis, mode="clip", indices_are_sorted=True)
    for i in (low, np.minimum(low + 1, max_index))
  )
  return below * (1 - weight) + above * weight


def kernel_init(
  key: Array, shape: Sequence[int], dtype: Any = jnp.float32
) -> Array:
  """`lecun_normal` of a kernel `[h, w, C, features]`, sampled as a matrix.

  The values are equal. On CPUs XLA unrolls loops over small windows, which made
  the initialisation of a tiny head take 12 times as long to compile.
  """
  matrix_shape = math.prod(shape[:-1]), shape[-1]
  return nn.initializers.lecun_normal()(key, matrix_shape, dtype).reshape(shape)


def conv(
  features: int, size: int, dtype: Any, name: str, **kwargs: Any
) -> nn.Conv:
  """A convolution with PyTorch's symmetric padding at any stride."""
  kwargs = dict(kernel_init=kernel_init) | kwargs
  return nn.Conv(
    features, (size, size), padding=size // 2, dtype=dtype, name=name, **kwargs
  )


class Pointwise(nn.Module):
  """1x1 convolution as a matrix product; kernel `[1, 1, C, features]`."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    shape = (1, 1, x.shape[-1], self.features)
    kernel = self.param("kernel", kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = (v.astype(self.dtype) for v in (x, kernel[0, 0], bias))
    return x @ kernel + bias


class Upsample(nn.Module):
  """Transposed convolution with stride = kernel size, as one matrix product.

  Every pixel becomes `f` x `f` pixels; the kernel's columns `[C, f*f*C]` are
  ordered (row, column, channel).
  """

  factor: int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    b, h, w, c = x.shape
    f = self.factor
    init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", init, (c, f * f * c))
    bias = self.param("bias", nn.initializers.zeros, (c,))
    x = (x @ kernel.astype(x.dtype)).reshape(b, h, w, f, f, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, f * h, f * w, c)
    return x + bias.astype(x.dtype)


class Reassemble(nn.Module):
  """Maps a stage's tokens to its channels and resolution.

  A 1x1 projection, then a resize by `factor`: transposed convolution, identity
  or strided convolution.
  """

  channels: int
  factor: float | int

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
    dtype = x.dtype
    x = Pointwise(self.channels, dtype, name="projection")(x)
    if self.factor < 1:
      stride = round(1 / self.factor)
      return conv(self.channels, 3, dtype, "resize", strides=stride)(x)
    if self.factor == 1:
      return x
    return Upsample(int(self.factor), name="resize")(x)


def reassemble(
  x: Float[Array, "b h w d"], i: int, channels: Sequence[int], features: int
) -> Float[Array, "b h2 w2 f"]:
  """Maps the tokens of stage i, from the shallowest, to the fused channels."""
  factor, name = (4, 2, 1, 0.5)[i], f"reassemble{i + 1}"
  y = Reassemble(channels[i], factor, name=name)(x)
  return conv(features, 3, x.dtype, f"lateral{i + 1}", use_bias=False)(y)


class Residual(nn.Module):
  """Pre-activation residual unit x + conv(relu(conv(relu(x))))."""

  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    y, bias = x, self.use_bias
    for name in ("conv1", "conv2"):
      y = conv(x.shape[-1], 3, x.dtype, name, use_bias=bias)(jax.nn.relu(y))
    return x + y


class Fusion(nn.Module):
  """Fuses the deeper stages' map `x` with a stage's map, resized to `size`.

  `stage` is None for the deepest stage, whose map is `x`.
  """

  resize: str = "products"  # See `resize_corners`.
  use_bias: bool = True  # In the residual units.

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    stage: Float[Array, "b h w c"] | None,
    size: tuple[int, int],
  ) -> Float[Array, "b h2 w2 c"]:
    if stage is not None:
      x = x + Residual(self.use_bias, name="residual1")(stage)
    x = Residual(self.use_bias, name="residual2")(x)
    # Released code projects after resizing. Interpolation weights sum to one,
    # so the order does not matter, and projecting first costs a quarter.
    x = Pointwise(x.shape[-1], x.dtype, name="projection")(x)
    return resize_corners(x, size, by=self.resize)


class DPT(nn.Module):
  """DPT: reassembles stages, fuses them from deep to shallow, predicts.

  Computes in the dtype of its input; the last layer and the result are
  float32. Parameter names number the stages 1 to 4 from the shallowest:
  `reassemble1`, `lateral1`, `fusion1`. `fusion4` omits the unused `residual1`
  of released checkpoints.
  """

  features: int  # Channels of the fused maps.
  channels: tuple[int, int, int, int]  # Per reassembled map, shallow first.
  head_features: int = 32  # Before the last layer.
  # 'layer': a LayerNorm per stage, for outputs of pre-norm blocks, whose scale
  # grows with depth. 'none': for tokens already normalised (Depth Anything, by
  # the encoder's last norm).
  tap_norm: str = "layer"
  # Factor by which the last fusion enlarges its map (4 times the patch grid).
  # Depth Anything has 2; with 1 the output convolutions cost a quarter, if the
  # prediction is not larger.
  upsample: int = 2
  # 'relu' (Depth Anything: non-negative disparity), or 'none' for training: a
  # dead ReLU passes no gradient.
  activation: str = "none"
  resize: str = "products"  # See `resize_corners`.

  @nn.compact
  def __call__(
    self, stages: Sequence[Float[Array, "b h w d"]], size: tuple[int, int]
  ) -> Float[Array, "b h2 w2"]:
    """Predicts a float32 map from the patch tokens of four layers.

    `stages` are the tokens as maps, shallow to deep; `size` is the prediction's
    rows and columns, in Depth Anything the image's.
    """
    check_choice("DPT.tap_norm", self.tap_norm, ("layer", "none"))
    check_choice("DPT.activation", self.activation, ("none", "relu"))
    if len(stages) != STAGES:
      raise InputError(f"DPT reads {STAGES} stages, got {len(stages)}.")
    maps = []  # [B, h_i, w_i, features]
    for i, x in enumerate(stages):
      if self.tap_norm == "layer":
        x = layers.norm(1e-6, x.dtype, f"norm{i + 1}")(x)
      maps.append(reassemble(x, i, self.channels, self.features))
    x = maps[-1]
    h, w = (self.upsample * side for side in maps[0].shape[1:3])
    sizes = [(h, w), *(m.shape[1:3] for m in maps[:-1])]
    for i in reversed(range(STAGES)):
      stage = maps[i] if i < STAGES - 1 else None
      x = Fusion(self.resize, name=f"fusion{i + 1}")(x, stage, sizes[i])
    x = conv(self.features // 2, 3, x.dtype, "conv1")(x)
    x = resize_corners(x, size, by=self.resize)
    x = jax.nn.relu(conv(self.head_features, 3, x.dtype, "conv2")(x))
    x = Pointwise(1, jnp.float32, name="conv3")(x)[..., 0]
    return jax.nn.relu(x) if self.activation == "relu" else x


@dataclasses.dataclass(frozen=True)
class DepthHead(base.PredictionHead):
  """Depth head: a DPT that predicts relative inverse depth.

  Larger is nearer, up to a scale and shift per image.
  """

  params_key = "depth"

  # Layers to read, shallow to deep, from 0; None for `quarter_layers`.
  taps: tuple[int, int, int, int] | None = None
  features: options.PositiveInt | None = None  # None for `default_shape`.
  channels: tuple[int, int, int, int] | None = None  # As above.
  tap_norm: Literal["layer", "none"] = DPT.tap_norm
  # Side of the map; None for four times the patch grid (a stride of 4 pixels at
  # patch 16), at most `MAX_SIDE`.
  size: options.PositiveInt | None = None
  # Overrides `size`: map sides relative to the patch grid. The patch size gives
  # one value per pixel, as in Depth Anything.
  scale: options.PositiveInt | None = None
  head_features: options.PositiveInt = DPT.head_features
  # 1 suffices for a map that is at most as large as the last fusion's.
  upsample: Literal[1, 2] = 1
  activation: Literal["none", "relu"] = DPT.activation

  def resolve(self, spec: Any) -> DepthHead:
    """Fills in the model's layers and channels."""
    image = spec.image
    taps = self.taps or quarter_layers(image.depth)
    stack_lib.check_layers(taps, image.depth)
    features, channels = default_shape(image.width)
    return dataclasses.replace(
      self,
      taps=taps,
      features=self.features or features,
      channels=self.channels or channels,
    )

  def module(self) -> DPT:
    if self.features is None or self.channels is None:
      raise ConfigError("depth: set features and channels, or call resolve().")
    return DPT(
      features=self.features,
      channels=self.channels,
      head_features=self.head_features,
      tap_norm=self.tap_norm,
      upsample=self.upsample,
      activation=self.activation,
    )

  def example(self, spec: Any) -> tuple:
    stage = jax.ShapeDtypeStruct((1, 2, 2, spec.image.width), "float32")
    return [stage] * STAGES, (8, 8)

  def map_size(self, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the map of a patch grid."""
    if self.scale is not None:
      return grid[0] * self.scale, grid[1] * self.scale
    rows, columns = (self.size or min(4 * side, MAX_SIDE) for side in grid)
    return rows, columns

  def predict(self, head, image, grid) -> dict[str, Array]:
    """Predicts `depth` `[B, H, W]`."""
    shape = (-1, *grid, image.patches.shape[-1])  # [B, h, w, D]
    tokens = [image.intermediates[i] for i in self.taps]
    stages = [x[:, -math.prod(grid) :].reshape(shape) for x in tokens]
    return {"depth": head(stages, self.map_size(grid))}


class DenseDPT(nn.Module):
  """DPT of TIPSv2's dense heads, whose stages also read the CLS token.

  The map has eight times the resolution of an even patch grid. Parameters are
  named as in `DPT`, plus `readout1` to `readout4`. They come from released
  files; no objective trains these heads.
  """

  features: int
  channels: tuple[int, int, int, int]  # Per reassembled map, shallow first.
  outputs: int
  activation: str = "none"  # Before the last layer: 'none' or 'relu'.
  norm_eps: float = 1e-6

  @nn.compact
  def __call__(
    self, stages: Sequence[Float[Array, "b k d"]], grid: tuple[int, int]
  ) -> Float[Array, "b h w c"]:
    """Predicts a float32 map from the tokens (CLS, patches) of four layers."""
    maps = []
    for i, x in enumerate(stages):
      x = layers.norm(self.norm_eps, x.dtype, f"norm{i + 1}")(x)
      cls, patches = jnp.broadcast_arrays(x[:, :1], x[:, 1:])
      x = jnp.concatenate([patches, cls], axis=-1)  # [B, N, 2 D]
      width = patches.shape[-1]
      x = layers.Dense(width, dtype=x.dtype, name=f"readout{i + 1}")(x)
      x = layers.gelu(x, "tanh").reshape(-1, *grid, width)
      maps.append(reassemble(x, i, self.channels, self.features))
    x, *skips = reversed(maps)
    skips = [None, *skips]
    for i, stage in zip((4, 3, 2, 1), skips, strict=True):
      if stage is not None:  # For an odd grid: to the deeper stages' size.
        stage = resize_grid(stage, x.shape[1:3], "bilinear").astype(x.dtype)
      size = (2 * x.shape[1], 2 * x.shape[2])
      x = Fusion(use_bias=False, name=f"fusion{i}")(x, stage, size)
    x = conv(self.features, 3, x.dtype, "conv1")(x)
    if self.activation == "relu":
      x = jax.nn.relu(x)
    return Pointwise(self.outputs, jnp.float32, name="conv2")(x)


@dataclasses.dataclass(frozen=True)
class DenseHead(base.PredictionHead):
  """Base class of TIPSv2's dense heads: layers, sizes and outputs."""

  output: ClassVar[str]  # Key of the prediction.
  activation: ClassVar[str] = "none"

  taps: tuple[int, int, int, int] = (2, 5, 8, 11)
  features: options.PositiveInt = 256
  channels: tuple[int, int, int, int] = (96, 192, 384, 768)
  outputs: options.PositiveInt = 3
  norm_eps: options.PositiveFloat = 1e-6

  def module(self) -> DenseDPT:
    return DenseDPT(
      features=self.features,
      channels=self.channels,
      outputs=self.outputs,
      activation=self.activation,
      norm_eps=self.norm_eps,
    )

  def example(self, spec: Any) -> tuple:
    stage = jax.ShapeDtypeStruct((1, 5, spec.image.width), "float32")
    return [stage] * STAGES, (2, 2)

  def predict(self, head, image, grid) -> dict[str, Array]:
    """Predicts the map, `[B, H, W]` or `[B, H, W, C]`."""
    prefix = image.prefix.shape[1]
    x = [image.intermediates[i] for i in self.taps]
    stages = [jnp.concatenate([y[:, :1], y[:, prefix:]], axis=1) for y in x]
    return {self.output: self._finish(head(stages, grid))}

  def _finish(self, x: Float[Array, "b h w c"]) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class MetricDepthHead(DenseHead):
  """Depth in metres: the mean of `outputs` bins, weighted by their logits."""

  params_key = "metric_depth"
  output = "depth"
  activation = "relu"

  min_depth: options.PositiveFloat = 0.001
  max_depth: options.PositiveFloat = 10.0

  def _finish(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w"]:
    weights = jax.nn.relu(x) + self.min_depth
    bins = jnp.linspace(self.min_depth, self.max_depth, self.outputs)
    return (weights * bins).sum(-1) / weights.sum(-1)


@dataclasses.dataclass(frozen=True)
class NormalsHead(DenseHead):
  """Surface normals (x, y, z), not normalised."""

  params_key = "normals"
  output = "normals"


@dataclasses.dataclass(frozen=True)
class SegmentationHead(DenseHead):
  """Logits of `outputs` classes."""

  params_key = "segmentation"
  output = "logits"
