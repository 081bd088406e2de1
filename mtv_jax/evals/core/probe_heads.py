"""Probe heads on frozen features: batch norm, convolutions, a linear layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, PyTree

from mtv_jax.evals.core import resizing
from mtv_jax.parallel.mesh import (
  replicate,
  replicated_sharding,
  shard_replicated,
)


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


def init_head(
  head: ProbeHead, channels: int, normal: Callable[[tuple[int, ...]], Any]
) -> tuple[PyTree, PyTree]:
  """Initial parameters and running statistics.

  The last layer is N(0, 0.01); convolutions use He et al. 2015 with fan-out.
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


def as_logits(logits: Array) -> Array:
  """Identity, the default `finish` of `predict_fn`."""
  return logits


def predict_fn(
  head: nn.Module,
  trained: Sequence[tuple[PyTree, PyTree]],
  *,
  mesh: Mesh,
  batch_size: int,
  finish: Callable[[Array], Array] = as_logits,
) -> Callable[[np.ndarray], list[Float32[np.ndarray, "n h w ..."]]]:
  """Returns a function from features to the output of each trained head."""
  variables = [
    replicate({"params": params, **state}, mesh) for params, state in trained
  ]
  apply = _apply_fn(head, finish, mesh)

  def predict(x: np.ndarray) -> list[np.ndarray]:
    padding = [(0, max(0, batch_size - len(x))), *[(0, 0)] * (x.ndim - 1)]
    batch = shard_replicated({"x": np.pad(x, padding)}, mesh)["x"]
    return [np.asarray(apply(v, batch))[: len(x)] for v in variables]

  return predict


@functools.lru_cache(maxsize=8)
def _apply_fn(
  head: nn.Module, finish: Callable, mesh: Mesh
) -> Callable[..., jax.Array]:
  @functools.partial(jax.jit, out_shardings=replicated_sharding(mesh))
  def apply(variables: PyTree, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
      return finish(head.apply(variables, x))

  return apply
