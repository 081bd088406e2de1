"""Linear segmentation head: features, loss and learning rate schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, UInt8

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.evals.core import global_features, probe, resizing
from mtv_jax.evals.core.examples import IGNORE
from mtv_jax.models.heads import dpt
from mtv_jax.utils.errors import InputError

LAYERS = ("LAST", "FOUR_LAST", "FOUR_EVEN")
NORMS = ("final", "none")
# Share of the steps with a rising learning rate: 1,500 of 40,000.
WARMUP = 1500 / 40000
_START = 1e-6  # of the peak, at step 0
_ROW_PARTS = 8


def taps(layers: str, depth: int) -> tuple[int, ...]:
  """The blocks whose tokens a head reads.

  Args:
    layers: `LAST`; `FOUR_LAST`; or `FOUR_EVEN`, the last of each quarter (2,
      5, 8, 11 of 12; 4, 11, 17, 23 of 24).
    depth: number of blocks of the encoder.

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


def features(
  encoder: Encoder,
  windows: Sequence[np.ndarray],
  *,
  layers: str,
  norm: str,
  batch_size: int,
) -> Float32[np.ndarray, "n h w c"]:
  """Patch tokens of windows, those of several blocks concatenated.

  Args:
    encoder: any.
    windows: of one size that the patch divides, in 0..255.
    layers: see `taps`.
    norm: `final` applies the encoder's last LayerNorm to every block's
      tokens, `none` to none.
    batch_size: windows a step.
  """
  depth = encoder.spec.image.depth
  blocks = taps(layers, depth)
  # The last block's normalised tokens come from the encoder itself.
  inner = tuple(i for i in blocks if norm == "none" or i != depth - 1)
  out = encoder.dense(
    windows,
    layers=inner,
    outputs=("patches",) if norm == "final" else (),
    batch_size=batch_size,
  )
  tokens = []
  for i in blocks:
    if i not in inner:
      tokens.append(out.patches)
    elif norm == "none":
      tokens.append(out.layers[i])
    else:
      tokens.append(global_features.final_norm(encoder, out.layers[i]))
  return tokens[0] if len(tokens) == 1 else np.concatenate(tokens, axis=-1)


def schedule(
  peak: float, *, steps: int, warmup: int
) -> Callable[[Any], Float[Array, ""]]:
  """DINOv3's learning rate by step.

  For s < W: peak * (1 - (1 - s / W) (1 - 1e-6)) * (1 - s / T), then
  peak / 2 * (1 + cos(pi (s + 1) / T)).

  Args:
    peak: the learning rate.
    steps: T.
    warmup: W.
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
  kernel = rng.normal(0, 0.01, (channels, classes)).astype(np.float32)
  params = {
    "norm": probe.batch_norm_affine(channels),
    "kernel": kernel,
    "bias": np.zeros(classes, np.float32),
  }
  return params, probe.batch_norm_stats(channels)


def make_loss(dropout: float) -> probe.Loss:
  """Cross-entropy of the upsampled logits, for `probe.fit`.

  Channel dropout, batch norm and a 1x1 convolution; the logits are upsampled
  bilinearly to the labels. As in mmsegmentation, an ignored pixel has a loss
  of 0 and counts in the mean.

  Args:
    dropout: probability that a channel of an image is dropped.
  """

  def loss(params, state, batch, rng):
    x, labels = batch["features"], batch["labels"]
    if dropout:
      shape = (x.shape[0], 1, 1, x.shape[3])
      keep = jax.random.bernoulli(rng, 1 - dropout, shape)
      x = jnp.where(keep, x / (1 - dropout), 0.0)
    x, state = probe.batch_norm_train(x, state, affine=params["norm"])
    logits = x @ params["kernel"] + params["bias"]
    return pixel_loss(logits, labels), state

  return loss


def pixel_loss(
  logits: Float[Array, "b h w k"], labels: UInt8[Array, "b H W"]
) -> Float[Array, ""]:
  """Cross-entropy at full size, mean over all pixels.

  The logits of all pixels would be the largest arrays by far (2.5 GB for 16
  crops of 512 pixels and 150 classes). They exist for an eighth of the rows at
  a time, and the backward pass recomputes them.

  Args:
    logits: on the patch grid.
    labels: classes, 255 where ignored.
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


@dataclasses.dataclass(frozen=True)
class LinearHeads:
  """Trained heads with batch norm folded into the 1x1 convolution.

  Attributes:
    kernel: of each head.
    bias: of each head.
  """

  kernel: Float32[np.ndarray, "c heads k"]
  bias: Float32[np.ndarray, "heads k"]

  def __call__(
    self, x: Float32[np.ndarray, "n h w c"]
  ) -> Float32[np.ndarray, "n h w heads k"]:
    """The heads' logits."""
    channels, heads, classes = self.kernel.shape
    flat = x.reshape(-1, channels) @ self.kernel.reshape(channels, -1)
    return flat.reshape(*x.shape[:3], heads, classes) + self.bias


def fold(trained: Sequence[tuple[Any, Any]]) -> LinearHeads:
  """Folds heads, given as (params, running statistics), for evaluation."""
  kernels, biases = [], []
  for params, stats in trained:
    norm = jax.tree.map(lambda x: np.asarray(x, np.float64), params["norm"])
    stats = jax.tree.map(lambda x: np.asarray(x, np.float64), stats)
    scale = norm["scale"] / np.sqrt(stats["var"] + 1e-5)
    shift = norm["bias"] - stats["mean"] * scale
    kernel = np.asarray(params["kernel"], np.float64)
    kernels.append(scale[:, None] * kernel)
    biases.append(shift @ kernel + np.asarray(params["bias"], np.float64))
  return LinearHeads(
    np.stack(kernels, axis=1).astype(np.float32),
    np.stack(biases).astype(np.float32),
  )
