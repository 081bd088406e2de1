"""Dense heads of TIPSv2: metric depth, surface normals, segmentation.

Each is a DPT (Ranftl et al. 2021) whose stages also read the CLS token. Weights
come from released files; no objective trains these heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.models import layers
from mtv_jax.models.heads import base, dpt
from mtv_jax.utils.resampling import resize_matrix


class DenseDPT(nn.Module):
  """DPT with readout of the CLS token.

  The map has eight times the resolution of an even patch grid. Parameters are
  named as in `dpt.DPT`, plus `readout1` to `readout4`.
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
    """Predicts a float32 map.

    Args:
      stages: tokens of four layers, shallow to deep: CLS, then patches.
      grid: rows and columns of the patches.
    """
    maps = []
    for i, x in enumerate(stages):
      x = layers.norm(self.norm_eps, x.dtype, f"norm{i + 1}")(x)
      cls, patches = jnp.broadcast_arrays(x[:, :1], x[:, 1:])
      x = jnp.concatenate([patches, cls], axis=-1)  # [B, N, 2 D]
      width = patches.shape[-1]
      x = layers.Dense(width, dtype=x.dtype, name=f"readout{i + 1}")(x)
      x = layers.gelu(x, "tanh").reshape(-1, *grid, width)
      x = dpt.Reassemble(
        self.channels[i], (4, 2, 1, 0.5)[i], name=f"reassemble{i + 1}"
      )(x)
      lateral = dpt.conv(
        self.features, 3, x.dtype, f"lateral{i + 1}", use_bias=False
      )
      maps.append(lateral(x))
    x, *others = reversed(maps)
    others = [None, *others]
    for i, stage in zip((4, 3, 2, 1), others, strict=True):
      if stage is not None:
        stage = _resize(stage, x.shape[1:3])
      size = (2 * x.shape[1], 2 * x.shape[2])
      x = dpt.Fusion(use_bias=False, name=f"fusion{i}")(x, stage, size)
    x = dpt.conv(self.features, 3, x.dtype, "conv1")(x)
    if self.activation == "relu":
      x = jax.nn.relu(x)
    return dpt.Pointwise(self.outputs, jnp.float32, name="conv2")(x)


def _resize(
  x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
  """Resizes an odd grid's map bilinearly to the deeper stages' size."""
  if x.shape[1:3] == size:
    return x
  rows, columns = (
    jnp.asarray(resize_matrix(a, b, "bilinear"), x.dtype)
    for a, b in zip(x.shape[1:3], size, strict=True)
  )
  return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x)


@dataclasses.dataclass(frozen=True)
class DenseHead(base.PredictionHead):
  """Base class of TIPSv2's dense heads: layers, sizes and outputs."""

  output: ClassVar[str]  # Key of the prediction.

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
      activation=self._activation(),
      norm_eps=self.norm_eps,
    )

  def _activation(self) -> str:
    return "none"

  def example(self, spec: Any) -> tuple:
    stage = jax.ShapeDtypeStruct((1, 5, spec.image.width), "float32")
    return [stage] * dpt.STAGES, (2, 2)

  def predict(
    self, head: Callable[..., Any], image: Any, grid: tuple[int, int]
  ) -> dict[str, Array]:
    """Predicts the map, `[B, H, W]` or `[B, H, W, C]`."""
    prefix = image.prefix.shape[1]
    taps = [image.taps[i] for i in self.taps]
    stages = [jnp.concatenate([x[:, :1], x[:, prefix:]], axis=1) for x in taps]
    return {self.output: self._finish(head(stages, grid))}

  def _finish(self, x: Float[Array, "b h w c"]) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class MetricDepthHead(DenseHead):
  """Depth in metres: the mean of `outputs` bins, weighted by their logits."""

  objective = "metric_depth"
  params_key = "metric_depth"
  output = "depth"

  min_depth: options.PositiveFloat = 0.001
  max_depth: options.PositiveFloat = 10.0

  def _activation(self) -> str:
    return "relu"

  def _finish(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w"]:
    weights = jax.nn.relu(x) + self.min_depth
    bins = jnp.linspace(self.min_depth, self.max_depth, self.outputs)
    return (weights * bins).sum(-1) / weights.sum(-1)


@dataclasses.dataclass(frozen=True)
class NormalsHead(DenseHead):
  """Surface normals (x, y, z), not normalised."""

  objective = "normals"
  params_key = "normals"
  output = "normals"


@dataclasses.dataclass(frozen=True)
class SegmentationHead(DenseHead):
  """Logits of `outputs` classes."""

  objective = "segmentation"
  params_key = "segmentation"
  output = "logits"
