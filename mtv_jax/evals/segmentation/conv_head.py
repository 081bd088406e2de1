"""Convolutional segmentation head: layers, loss and inference.

The FCN head of mmsegmentation (Long et al. 2015; `num_convs=2`): two 3x3
convolutions, each with batch norm and ReLU, channel dropout and a 1x1
convolution. That it is trained on frozen features, which pass a batch norm
first as those of the linear head, is our choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, PyTree

from mtv_jax.evals.core import probe
from mtv_jax.evals.segmentation import linear_head
from mtv_jax.parallel.mesh import replicated_sharding

FEATURES = 256  # channels of the convolutions
_CONVS = ("conv1", "conv2")


def init(
  channels: int, classes: int, *, features: int = FEATURES, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters and running statistics of a new head.

  Convolutions as He et al. 2015 by the fan-out, without biases; the last layer
  N(0, 0.01).
  """
  rng = np.random.default_rng(seed)
  params: dict[str, Any] = {"norm": probe.batch_norm_affine(channels)}
  stats = {"norm": probe.batch_norm_stats(channels)}
  std = np.sqrt(2 / (9 * features))
  width = channels
  for name in _CONVS:
    kernel = rng.normal(0, std, (3, 3, width, features)).astype(np.float32)
    params[name] = {
      "kernel": kernel,
      "norm": probe.batch_norm_affine(features),
    }
    stats[name] = probe.batch_norm_stats(features)
    width = features
  kernel = rng.normal(0, 0.01, (features, classes)).astype(np.float32)
  bias = np.zeros(classes, np.float32)
  return {**params, "kernel": kernel, "bias": bias}, stats


def make_loss(dropout: float) -> probe.Loss:
  """Cross-entropy as of `linear_head.make_loss`, with dropout at the end."""

  def loss(params, stats, batch, rng):
    x, new = _features(params, stats, batch["features"], train=True)
    x = linear_head.channel_dropout(x, dropout, rng)
    logits = x @ params["kernel"] + params["bias"]
    return linear_head.pixel_loss(logits, batch["targets"]), new

  return loss


def _features(
  params: PyTree, stats: PyTree, x: Float[Array, "b h w c"], *, train: bool
) -> tuple[Float[Array, "b h w d"], dict[str, PyTree]]:
  """The input of the last layer, and the running statistics."""
  new = {}

  def normalize(x, name, affine):
    if not train:
      return probe.batch_norm_eval(x, stats[name], affine=affine)
    x, new[name] = probe.batch_norm_train(x, stats[name], affine=affine)
    return x

  x = normalize(x, "norm", params["norm"])
  for name in _CONVS:
    x = jax.lax.conv_general_dilated(
      x,
      params[name]["kernel"],
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(normalize(x, name, params[name]["norm"]))
  return x, new


def predict_fn(
  trained: Sequence[tuple[PyTree, PyTree]], *, mesh: Mesh, batch_size: int
) -> Callable[[np.ndarray], Float32[np.ndarray, "n h w heads k"]]:
  """The scores of heads, (params, running statistics), at patch resolution.

  Args:
    trained: the heads.
    mesh: shards the batch.
    batch_size: rows to which a batch is padded, so that one shape is compiled.
  """
  heads = [probe.replicate(head, mesh) for head in trained]
  run = _logits_fn(mesh)

  def scores(x: np.ndarray) -> np.ndarray:
    padding = [(0, max(0, batch_size - len(x))), (0, 0), (0, 0), (0, 0)]
    batch = probe.shard_batch({"x": np.pad(x, padding)}, mesh)["x"]
    logits = [np.asarray(run(*head, batch))[: len(x)] for head in heads]
    return np.stack(logits, axis=-2)

  return scores


@functools.lru_cache(maxsize=8)
def _logits_fn(mesh: Mesh) -> Callable[..., jax.Array]:
  @functools.partial(jax.jit, out_shardings=replicated_sharding(mesh))
  def logits(params: PyTree, stats: PyTree, x: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
      x, _ = _features(params, stats, x, train=False)
      return x @ params["kernel"] + params["bias"]

  return logits
