"""Cross-entropy of tokens over a large vocabulary, in chunks of its columns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtv_jax.models.language_model import TokenLogits
from mtv_jax.objectives import prototypes


def cross_entropies(
  logits: TokenLogits,
  targets: Int[Array, "b s l"],
  *,
  chunk: int | None = None,
) -> tuple[Float[Array, "b s l"], Bool[Array, "b s l"]]:
  """-log softmax(logits)[target], and whether the target is the argmax.

  `chunk`: columns of the logits to compute at a time, forward and backward.
  """
  size = logits.bias.shape[0]
  columns = jnp.arange(size)
  kernel, bias = logits.kernel, logits.bias
  if chunk is not None and size > chunk and size % chunk:
    # Padding columns, with probability 0.
    padding = -size % chunk
    kernel = jnp.pad(kernel, ((0, 0), (0, padding)))
    bias = jnp.pad(bias, (0, padding), constant_values=-1e9)
    columns = jnp.pad(columns, (0, padding), constant_values=-1)

  def score_chunk(kernel, bias, columns):
    scores = logits.chunk(kernel, bias)  # [b, s, l, c]
    hit = columns == targets[..., None]
    return {
      "sum": jax.nn.logsumexp(scores, axis=-1),
      "target": jnp.sum(jnp.where(hit, scores, 0.0), axis=-1),
      "other": jnp.max(jnp.where(hit, -jnp.inf, scores), axis=-1),
    }

  parts = prototypes.map_chunks(score_chunk, chunk, kernel, bias, columns)
  target = parts["target"].sum(axis=0)  # [b, s, l]
  losses = jax.nn.logsumexp(parts["sum"], axis=0) - target
  return losses, target > parts["other"].max(axis=0)
