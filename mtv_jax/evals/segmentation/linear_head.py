"""Linear segmentation head: layers, loss, schedule and inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from mtv_jax.evals.core import probe, resizing
from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.models.heads import dpt
from mtv_jax.utils.errors import InputError

# Share of the steps with a rising learning rate: 1,500 of 40,000.
WARMUP = 1500 / 40000
_START = 1e-6  # learning rate at step 0, as a fraction of the peak
_ROW_PARTS = 8


def taps(layers: str, depth: int) -> tuple[int, ...]:
  """The blocks that a head reads.

  `LAST`, `FOUR_LAST`, or the last of each quarter (`FOUR_EVEN`: 2, 5, 8, 11 of
  12; 4, 11, 17, 23 of 24).

  Raises:
    InputError: for four blocks of an encoder with fewer.
  """
  if layers == "LAST":
    return (depth - 1,)
  if depth < 4:
    raise InputError(
      f"layers={layers!r} reads four blocks and this encoder has {depth}; use "
      "layers='LAST'"
    )
  if layers == "FOUR_LAST":
    return tuple(range(depth - 4, depth))
  return dpt.quarter_taps(depth)


def schedule(
  peak: float, *, steps: int, warmup: int
) -> Callable[[Any], Float[Array, ""]]:
  """DINOv3's learning rate by step s, with W warm-up steps of T.

  For s < W: peak * (1 - (1 - s / W) (1 - 1e-6)) * (1 - s / T), then
  peak / 2 * (1 + cos(pi (s + 1) / T)).
  """

  def rate(step):
    s = jnp.asarray(step, jnp.float32)
    share = s / max(warmup, 1)
    # 1 - (1 - share) (1 - 1e-6), without cancellation at small shares.
    rising = share + _START * (1 - share)
    linear = peak * rising * (1 - s / steps)
    cosine = peak / 2 * (1 + jnp.cos(jnp.pi * (s + 1) / steps))
    return jnp.where(s < warmup, linear, cosine)

  return rate


def init(
  channels: int, classes: int, *, seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters and running statistics of a new head; weights N(0, 0.01)."""
  rng = np.random.default_rng(seed)
  params = {
    "norm": probe.batch_norm_affine(channels),
    "kernel": rng.normal(0, 0.01, (channels, classes)).astype(np.float32),
    "bias": np.zeros(classes, np.float32),
  }
  return params, probe.batch_norm_stats(channels)


def make_loss(dropout: float) -> probe.Loss:
  """Cross-entropy of `features` and label maps `targets`, for `probe.fit`.

  Channel dropout (with probability `dropout`, for each image), batch norm and
  a 1x1 convolution; the logits are upsampled bilinearly to the labels.
  """

  def loss(params, state, batch, rng):
    x = channel_dropout(batch["features"], dropout, rng)  # [B, h, w, C]
    x, state = probe.batch_norm_train(x, state, affine=params["norm"])
    logits = x @ params["kernel"] + params["bias"]
    return pixel_loss(logits, batch["targets"]), state

  return loss


def channel_dropout(
  x: Float[Array, "b h w c"], dropout: float, rng: jax.Array
) -> Float[Array, "b h w c"]:
  """Zeroes whole channels of each image with the probability `dropout`."""
  if not dropout:
    return x
  shape = (x.shape[0], 1, 1, x.shape[3])
  keep = jax.random.bernoulli(rng, 1 - dropout, shape)
  return jnp.where(keep, x / (1 - dropout), 0.0)


def pixel_loss(
  logits: Float[Array, "b h w k"], labels: UInt8[Array, "b H W"]
) -> Float[Array, ""]:
  """Cross-entropy at full size, mean over all pixels.

  As in mmsegmentation, an ignored pixel has a loss of 0 and counts in the mean.

  The logits of all pixels would be the largest arrays by far (2.5 GB for 16
  crops of 512 pixels and 150 classes). They exist for an eighth of the rows at
  a time, and the backward pass recomputes them.
  """
  b, height, width = labels.shape
  parts = math.gcd(height, _ROW_PARTS)
  wide = resizing.resize(logits, (logits.shape[1], width))  # [b, h, W, k]
  rows = resizing.matrix(logits.shape[1], height).astype(np.float32)

  @jax.checkpoint
  def part(total, block):
    rows, labels = block
    full = jnp.einsum(
      "yh,bhxk->byxk", rows, wide, precision=jax.lax.Precision.HIGHEST
    )
    valid = labels != IGNORE
    target = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(full, target)
    return total + jnp.sum(jnp.where(valid, losses, 0.0)), None

  blocks = (
    jnp.asarray(rows.reshape(parts, height // parts, -1)),
    labels.reshape(b, parts, height // parts, width).swapaxes(0, 1),
  )
  total, _ = jax.lax.scan(part, jnp.float32(0), blocks)
  return total / labels.size


def fold(
  trained: Sequence[tuple[Any, Any]],
) -> Callable[[np.ndarray], np.ndarray]:
  """Folds the batch norm of heads, (params, running statistics).

  Returns the function from features `[n, h, w, c]` to `[n, h, w, heads, k]`.
  """
  kernels, biases = [], []
  for head in trained:
    params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), head)
    norm, kernel = params["norm"], params["kernel"]
    scale = norm["scale"] / np.sqrt(stats["var"] + 1e-5)
    shift = norm["bias"] - stats["mean"] * scale
    kernels.append(scale[:, None] * kernel)
    biases.append(shift @ kernel + params["bias"])
  kernel = np.concatenate(kernels, axis=1).astype(np.float32)
  bias = np.stack(biases).astype(np.float32)

  def logits(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(-1, len(kernel)) @ kernel
    return flat.reshape(*x.shape[:3], *bias.shape) + bias

  return logits
