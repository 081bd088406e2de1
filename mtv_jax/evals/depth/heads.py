"""Heads of the depth probes: metric depth from frozen features.

Depth is the mean of fixed bins over the range, weighted by the head's logits:
Bhat et al. 2021 (AdaBins) as in DINOv2's probes. A head maps features to depth
on a grid; `views.View.restore` resamples it to the image.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, PyTree

from mtv_jax.evals.core import probe, resizing
from mtv_jax.models.heads import dpt

BINS = 256
MIN_DEPTH = 1e-3
# Added to every weight, so that the gradient does not vanish with all of them.
_FLOOR = 0.1


def bin_depths(
  max_depth: float | int, count: int = BINS
) -> Float32[np.ndarray, " k"]:
  """Depths of the bins in metres, evenly from 1 mm to `max_depth`."""
  return np.linspace(MIN_DEPTH, max_depth, count, dtype=np.float32)


def expected_depth(
  logits: Float[Array, "*n k"],
  depths: Float[Array, " k"] | Float[np.ndarray, " k"],
) -> Float[Array, "*n"]:
  """sum_k p_k b_k with p = (relu(z) + 0.1) / sum (relu(z) + 0.1)."""
  weights = jax.nn.relu(logits) + _FLOOR
  return weights @ depths / weights.sum(-1)


@dataclasses.dataclass(frozen=True)
class Head:
  """Base class of the heads."""

  channels: int  # channels of the features
  max_depth: float  # depth of the last bin, in metres

  def apply(
    self,
    params: PyTree,
    state: PyTree,
    features: Float[Array, "b h w c"],
    *,
    train: bool = False,
  ) -> tuple[Float[Array, "b h2 w2"], PyTree]:
    """Depth in metres on the head's grid, and the state."""
    logits, state = self._logits(params, state, features, train)
    return expected_depth(logits, bin_depths(self.max_depth)), state


@dataclasses.dataclass(frozen=True)
class LinearHead(Head):
  """A linear map from each patch to the bins.

  The logits are upsampled (bilinear, half-pixel centres). Upstream upsamples
  the features, which is equal, as the map is linear, and more expensive.
  """

  batch_norm: bool = False  # normalises the features
  upsample: int = 1

  def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
    """N(0, 0.01) and zeros, as in mmsegmentation."""
    kernel = 0.01 * jax.random.normal(key, (self.channels, BINS))
    params = {"kernel": kernel, "bias": jnp.zeros(BINS)}
    if not self.batch_norm:
      return params, {}
    params["norm"] = probe.batch_norm_affine(self.channels)
    return params, probe.batch_norm_stats(self.channels)

  def _logits(self, params, state, x, train):
    if self.batch_norm and train:
      x, state = probe.batch_norm_train(x, state, affine=params["norm"])
    elif self.batch_norm:
      x = probe.batch_norm_eval(x, state, affine=params["norm"])
    logits = x @ params["kernel"] + params["bias"]
    size = tuple(side * self.upsample for side in x.shape[1:3])
    return resizing.resize(logits, size), state


class _ResidualUnit(nn.Module):
  """x + relu(conv(relu(conv(x))))."""

  @nn.compact
  def __call__(self, x):
    y = x
    for name in ("conv1", "conv2"):
      y = jax.nn.relu(_conv(x.shape[-1], 3, name)(y))
    return x + y


class _DPT(nn.Module):
  """Probe3D's DPT (El Banani et al. 2024): four stages, fused from the last.

  Unlike Depth Anything's (`models/heads/dpt.py`), all four maps have twice the
  patch grid, without projections between the stages.
  """

  features: int

  @nn.compact
  def __call__(self, stages):
    maps = []
    for i, x in enumerate(stages):
      x = _conv(self.features, 1, f"lateral{i + 1}")(x)
      maps.append(_upsample(x, 2))
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
  # PyTorch's initializer of weights: uniform, +-1 / sqrt(fan in).
  uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  return dpt.conv(features, size, jnp.float32, name, kernel_init=uniform)


@dataclasses.dataclass(frozen=True)
class DPTHead(Head):
  """Probe3D's dense head on concatenated features of four layers.

  The depth map has 16 times the patch grid; the maps inside have `features`
  channels.
  """

  features: int = 512

  def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Parameters and an empty state."""
    example = [jnp.zeros((1, 1, 1, self.channels // dpt.STAGES))] * dpt.STAGES
    return jax.jit(_DPT(self.features).init)(key, example)["params"], {}

  def _logits(self, params, state, x, train):
    del train
    stages = jnp.split(x, dpt.STAGES, axis=-1)
    return _DPT(self.features).apply({"params": params}, stages), state
