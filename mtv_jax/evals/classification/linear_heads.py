"""Linear heads for a grid of learning rates and features, trained together.

The heads of one choice of features are one array with an axis of learning
rates, so that a step costs one wide matrix product for each choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, PyTree

from mtv_jax.evals.classification.base import map_rows
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.global_features import LastBlocks

_ROWS = 1024  # scored at a time


@dataclasses.dataclass(frozen=True)
class Table:
  """The features of all heads, side by side.

  Attributes:
    x: `[n, f]`, the mean patch, then the tokens of the last block, the one
      before it and so on.
    columns: of each head: `1 block`, `1 block + mean`, `4 blocks`, ...
  """

  x: Float32[np.ndarray, "n f"]
  columns: dict[str, slice]


def make_table(
  features: LastBlocks, *, blocks: Sequence[int], average: Sequence[str]
) -> Table:
  """The table of an image set, for heads of `blocks` x `average`.

  Args:
    features: with at least as many blocks as the largest of `blocks`.
    blocks: numbers of last blocks.
    average: `off`, `on` or both: heads without or with the mean patch.
  """
  widths = [token.shape[1] for token in features.tokens]
  first = features.mean.shape[1]
  columns = {}
  for count in blocks:
    stop = first + sum(widths[:count])
    name = f"{count} block" + "s" * (count > 1)
    if "off" in average:
      columns[name] = slice(first, stop)
    if "on" in average:
      columns[f"{name} + mean"] = slice(0, stop)
  used = features.tokens[: max(blocks)]
  return Table(np.concatenate([features.mean, *used], axis=1), columns)


def init(
  columns: Mapping[str, slice], *, rates: int, classes: int, seed: int = 0
) -> dict[str, dict[str, Float32[np.ndarray, "..."]]]:
  """Kernels `[d, rates, classes]` ~ N(0, 0.01^2), biases zero.

  The same for every rate.
  """
  rng = np.random.default_rng(seed)
  params = {}
  for name, c in columns.items():
    kernel = rng.normal(0, 0.01, (c.stop - c.start, 1, classes))
    kernel = np.repeat(kernel.astype(np.float32), rates, axis=1)
    bias = np.zeros((rates, classes), np.float32)
    params[name] = {"kernel": kernel, "bias": bias}
  return params


def optimizer(
  rates: Sequence[float], *, steps: int, batch_size: int
) -> optax.GradientTransformation:
  """SGD with momentum 0.9, each head at its own rate * batch / 256.

  The rates decay to zero along a cosine.
  """
  scale = np.asarray(rates, np.float32)[:, None] * (batch_size / 256)
  return optax.chain(
    optax.trace(0.9),
    optax.scale_by_learning_rate(optax.cosine_decay_schedule(1.0, steps)),
    # The axis of rates is the second to last one of kernels and biases.
    optax.stateless_with_tree_map(lambda update, _: update * scale),
  )


def train(
  batches: probe.Batches,
  *,
  columns: Mapping[str, slice],
  rates: Sequence[float],
  classes: int,
  steps: int,
  batch_size: int,
  seed: int = 0,
  mesh: Mesh | None = None,
) -> probe.FitResult:
  """Trains all heads; the loss is the mean of their cross-entropies.

  Args:
    batches: by step, `x` `[b, f]` of a table and `label` `[b]`.
    columns: of the table.
    rates: learning rates at a batch of 256.
    classes: number of classes.
    steps: of SGD.
    batch_size: b.
    seed: of the initial heads.
    mesh: as for `probe.fit`.
  """
  params = init(columns, rates=len(rates), classes=classes, seed=seed)
  heads = len(columns) * len(rates)

  def loss(params, state, batch, rng):
    del rng
    total = 0.0
    for name, c in columns.items():
      losses = jax.vmap(_head_loss, in_axes=(1, 0, None, None))
      x = batch["x"][:, c]
      head = params[name]
      total += losses(head["kernel"], head["bias"], x, batch["label"]).sum()
    # A sum, so that each head has the gradient of its own loss.
    return total, state

  fitted = probe.fit(
    loss,
    params,
    batches,
    optimizer=optimizer(rates, steps=steps, batch_size=batch_size),
    steps=steps,
    mesh=mesh,
  )
  return dataclasses.replace(fitted, losses=fitted.losses / heads)


def _head_loss(kernel, bias, x, label) -> Float[Array, ""]:
  """Mean cross-entropy of one head."""
  logits = x @ kernel + bias
  return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def top1(
  params: PyTree, data: Table, labels: Int[np.ndarray, " n"]
) -> dict[str, Float[np.ndarray, " rates"]]:
  """Top-1 accuracy at each learning rate, by choice of features."""
  params = jax.tree.map(np.asarray, params)
  columns = tuple((k, c.start, c.stop) for k, c in data.columns.items())
  hits = dict.fromkeys(data.columns, 0.0)
  for start in range(0, len(labels), _ROWS):
    x, y = data.x[start : start + _ROWS], labels[start : start + _ROWS]
    short = _ROWS - len(y) if start else 0
    x = np.pad(x, ((0, short), (0, 0)))
    y = np.pad(y, (0, short), constant_values=-1)
    for name, count in _count_hits(params, x, y, columns).items():
      hits[name] = hits[name] + np.asarray(count, np.float64)
  return {name: count / len(labels) for name, count in hits.items()}


@functools.partial(jax.jit, static_argnames="columns")
def _count_hits(params, x, labels, columns):
  hits = {}
  for name, start, stop in columns:
    logits = _logits(params[name], x[:, start:stop])
    # The lowest class of equal ones; a padding row's label is -1.
    predicted = jnp.argmax(logits, axis=-1)  # [n, rates]
    hits[name] = jnp.sum(predicted == labels[:, None], axis=0)
  return hits


def scores(
  params: PyTree, data: Table, *, name: str, rate: int
) -> Float32[np.ndarray, "n c"]:
  """Logits of the head with the learning rate of index `rate`."""
  # [d, 1, c] and [1, c]: the axis of rates is the second to last one.
  head = jax.tree.map(
    lambda p: np.asarray(p)[..., rate : rate + 1, :], params[name]
  )
  x = data.x[:, data.columns[name]]
  return map_rows(functools.partial(_jit_logits, head), x, rows=_ROWS)[:, 0]


def _logits(head, x):
  """Logits `[n, rates, classes]`."""
  product = jnp.einsum(
    "nd,drc->nrc", x, head["kernel"], precision=jax.lax.Precision.HIGHEST
  )
  return product + head["bias"]


_jit_logits = jax.jit(_logits)
