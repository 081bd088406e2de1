"""Probe heads on frozen features: linear, FCN and DPT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.evals.core import resizing
from mtv_jax.models.heads import dpt
from mtv_jax.parallel import mesh as mesh_lib


class ProbeHead(nn.Module):
  """Linear or FCN head: features `[..., C]` to logits `[..., K]`.

  Channel dropout, batch norm (Ioffe & Szegedy 2015) and a linear layer. With
  `convs`, mmsegmentation's FCN head (Long et al. 2015): batch norm, 3x3
  convolutions with batch norm and ReLU, channel dropout, linear layer.
  Batch statistics are global over a sharded batch (SyncBN).
  """

  classes: int
  batch_norm: bool = True
  affine: bool = True  # whether the batch norm has a scale and a bias
  epsilon: float = 1e-5
  dropout: float = 0.0  # channel dropout rate, per image
  convs: int = 0
  conv_features: int = 256
  upsample: int = 1  # factor by which the logits are upsampled (bilinear)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b *n c"] | Float[np.ndarray, "b *n c"],
    *,
    train: bool = False,
    rng: jax.Array | None = None,
  ) -> Float[Array, "b *m k"]:
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=self.epsilon,
      use_scale=self.affine,
      use_bias=self.affine,
      use_fast_variance=False,
    )
    drop = functools.partial(
      nn.Dropout(self.dropout, broadcast_dims=(1, 2)),
      deterministic=not train,
      rng=rng,
    )
    if not self.convs:
      x = drop(x)
    if self.batch_norm:
      x = norm(name="norm")(x)
    for i in range(1, self.convs + 1):
      conv = nn.Conv(
        self.conv_features, (3, 3), use_bias=False, name=f"conv{i}"
      )
      x = nn.relu(norm(name=f"norm{i}")(conv(x)))
    if self.convs:
      x = drop(x)
    x = nn.Dense(self.classes, name="logits")(x)
    if self.upsample == 1:
      return x
    height, width = (self.upsample * side for side in x.shape[1:3])
    return resizing.resize(x, (height, width))


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

  Input: concatenated features of four layers. Logits are 16 times as high and
  wide as the patch grid; inner maps have `features` channels. Unlike in Depth
  Anything (`models/heads/dpt.py`), all four maps are twice as high and wide as
  the grid, without projections between stages.
  """

  features: int
  outputs: int

  @nn.compact
  def __call__(self, x, *, train=False, rng=None):
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
    return _upsample(_conv(self.outputs, 3, "conv2")(x), 2)


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


def init_head(
  head: ProbeHead, channels: int, normal: Callable[[tuple[int, ...]], Any]
) -> tuple[PyTree, PyTree]:
  """Initial parameters and running statistics.

  The last layer has std 0.01; convolutions use He et al. 2015 with fan-out.
  `normal(shape)` draws from N(0, 1), layer by layer.
  """
  # At least as large as the convolution kernel.
  example = jax.ShapeDtypeStruct((1, 3, 3, channels), np.float32)
  shapes = jax.eval_shape(head.init, jax.random.key(0), example)

  def draw(path, leaf):
    name = path[-1].key
    if name != "kernel":
      return np.full(leaf.shape, name in ("scale", "var"), np.float32)
    std = 0.01 if leaf.ndim == 2 else np.sqrt(2 / (9 * leaf.shape[-1]))
    return np.asarray(std * normal(leaf.shape), np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, shapes)
  return variables.pop("params"), variables


def apply_training(head, params, state, x, rng):
  """Returns a head's output on a training batch, and new running statistics."""
  variables, mutable = {"params": params, **state}, ["batch_stats"]
  return head.apply(variables, x, train=True, rng=rng, mutable=mutable)


def predict_fn(
  head: nn.Module,
  trained: Sequence[tuple[PyTree, PyTree]],
  *,
  mesh: Mesh,
  batch_size: int,
  finish: Callable[[Array], Array] | None = None,
) -> Callable[[np.ndarray], list[np.ndarray]]:
  """Returns a function from features `[n, h, w, c]` to each head's output."""
  variables = [
    mesh_lib.replicate({"params": params, **state}, mesh)
    for params, state in trained
  ]
  apply = _apply_fn(head, finish, mesh)

  def predict(x: np.ndarray) -> list[np.ndarray]:
    padding = [(0, max(0, batch_size - len(x))), *[(0, 0)] * (x.ndim - 1)]
    batch = mesh_lib.shard_replicated({"x": np.pad(x, padding)}, mesh)["x"]
    return [np.asarray(apply(v, batch))[: len(x)] for v in variables]

  return predict


@functools.lru_cache(maxsize=8)
def _apply_fn(head: nn.Module, finish: Callable | None, mesh: Mesh) -> Callable:
  @functools.partial(jax.jit, out_shardings=mesh_lib.replicated_sharding(mesh))
  def apply(variables: PyTree, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
      out = head.apply(variables, x)
      return finish(out) if finish else out

  return apply
