"""Heads of the depth probes: metric depth from frozen features.

Depth is the mean of fixed bins weighted by the head's logits: Bhat et al. 2021
(AdaBins) as in DINOv2's probes. A head maps features to logits on a grid;
`PaddedView.restore` resamples the depth to the image.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, PyTree

from mtv_jax.evals.core.probe_heads import ProbeHead, init_head
from mtv_jax.models.heads import dpt

BINS = 256
MIN_DEPTH = 1e-3
# Added to every weight, so that the gradient survives if all weights are 0.
_FLOOR = 0.1


@dataclasses.dataclass(frozen=True)
class DepthBins:
  """Metric depth from logits of bins from 1 mm to `max_depth`."""

  max_depth: float  # depth of the last bin, in metres

  @property
  def depths(self) -> Float32[np.ndarray, " k"]:
    """Depths of the bins in metres, evenly spaced."""
    return np.linspace(MIN_DEPTH, self.max_depth, BINS, dtype=np.float32)

  def __call__(self, logits: Float[Array, "*n k"]) -> Float[Array, "*n"]:
    """sum_k p_k b_k with p = (relu(z) + 0.1) / sum (relu(z) + 0.1)."""
    weights = jax.nn.relu(logits) + _FLOOR
    return weights @ self.depths / weights.sum(-1)


class _ResidualUnit(nn.Module):
  """x + relu(conv(relu(conv(x))))."""

  @nn.compact
  def __call__(self, x):
    y = x
    for name in ("conv1", "conv2"):
      y = jax.nn.relu(_conv(x.shape[-1], 3, name)(y))
    return x + y


class DPTHead(nn.Module):
  """Probe3D's DPT (El Banani et al. 2024): four stages, fused from the last.

  Input: concatenated features of four layers. Logits have 16 times the patch
  grid; inner maps have `features` channels. Unlike Depth Anything's
  (`models/heads/dpt.py`), all four maps have twice the patch grid, without
  projections between stages.
  """

  features: int

  @nn.compact
  def __call__(self, x, *, train=False):
    del train
    maps = []
    for i, stage in enumerate(jnp.split(x, dpt.STAGES, axis=-1)):
      lateral = _conv(self.features, 1, f"lateral{i + 1}")(stage)
      maps.append(_upsample(lateral, 2))
    x = _ResidualUnit(name="unit4_2")(maps[3])
    for i in (3, 2, 1):
      x = _ResidualUnit(name=f"unit{i}_1")(maps[i - 1]) + x
      x = _ResidualUnit(name=f"unit{i}_2")(x)
    x = _upsample(x, 4)
    x = jax.nn.relu(_conv(self.features, 3, "conv1")(x))
    return _upsample(_conv(BINS, 3, "conv2")(x), 2)


def _upsample(x, factor):
  h, w = x.shape[1:3]
  return dpt.resize_corners(x, (factor * h, factor * w))


def _conv(features: int, size: int, name: str) -> nn.Conv:
  # PyTorch's default weight initializer: uniform, +-1 / sqrt(fan in).
  uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  return dpt.conv(features, size, jnp.float32, name, kernel_init=uniform)


def init_depth_head(
  head: ProbeHead | DPTHead, channels: int, *, seed: int
) -> tuple[PyTree, PyTree]:
  """Initial parameters and running statistics."""
  key = jax.random.key(seed)
  if isinstance(head, ProbeHead):
    return init_head(head, channels, functools.partial(jax.random.normal, key))
  example = jnp.zeros((1, 1, 1, channels))
  return jax.jit(head.init)(key, example)["params"], {}
