"""Many linear heads on the same features, trained in one pass.

A head for each learning rate and each choice of features. Heads of different
rates differ in nothing else, so they are one array with an axis of rates, and
what a step costs is one wide matrix product for each choice of features.
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

from mtv_jax.evals.core import probe
from mtv_jax.evals.core.global_features import LastBlocks

_ROWS = 1024  # scored at a time


@dataclasses.dataclass(frozen=True)
class Columns:
  """Where a head's features are in a table of features.

  Attributes:
    start: first column.
    stop: after the last one.
  """

  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Table:
  """Features of all heads, side by side.

  Attributes:
    x: `[n, f]`, the mean patch, then the tokens of the last block, the one
      before it and so on.
    columns: by head, as `1 block`, `1 block + mean`, `4 blocks`, ...
  """

  x: Float32[np.ndarray, "n f"]
  columns: dict[str, Columns]


def table(
  found: LastBlocks, *, blocks: Sequence[int], average: Sequence[str]
) -> Table:
  """Features of an image set, for heads of `blocks` x `average`.

  Args:
    found: with at least as many blocks as the largest of `blocks`.
    blocks: numbers of last blocks.
    average: `off`, `on` or both: whether the mean patch stands beside them.
  """
  widths = [token.shape[1] for token in found.tokens]
  first = found.mean.shape[1]
  columns = {}
  for count in blocks:
    stop = first + sum(widths[:count])
    name = f"{count} block" + "s" * (count > 1)
    if "off" in average:
      columns[name] = Columns(first, stop)
    if "on" in average:
      columns[f"{name} + mean"] = Columns(0, stop)
  used = found.tokens[: max(blocks)]
  return Table(np.concatenate([found.mean, *used], axis=1), columns)


def init(
  columns: Mapping[str, Columns], *, rates: int, classes: int, seed: int = 0
) -> dict[str, dict[str, Float32[np.ndarray, "..."]]]:
  """Kernels `[d, rates, classes]` ~ N(0, 0.01^2), biases zero.

  The same for every rate, so that they differ in the rate alone.
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
    # The axis of rates is the last but one, of kernels and of biases.
    optax.stateless_with_tree_map(lambda update, _: update * scale),
  )


def train(
  batches: probe.Batches,
  *,
  columns: Mapping[str, Columns],
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
    classes: how many there are.
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
      each = jax.vmap(_head_loss, in_axes=(1, 0, None, None))
      x = batch["x"][:, c.start : c.stop]
      head = params[name]
      total += each(head["kernel"], head["bias"], x, batch["label"]).sum()
    # A sum, so that each head has the gradient that it has alone.
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
  """By choice of features, the top-1 accuracy at each rate."""
  params = jax.tree.map(np.asarray, params)
  columns = tuple((k, c.start, c.stop) for k, c in data.columns.items())
  hits = dict.fromkeys(data.columns, 0.0)
  for start in range(0, len(labels), _ROWS):
    x, y = data.x[start : start + _ROWS], labels[start : start + _ROWS]
    short = _ROWS - len(y) if start else 0
    x = np.pad(x, ((0, short), (0, 0)))
    y = np.pad(y, (0, short), constant_values=-1)
    for name, found in _hits(params, x, y, columns).items():
      hits[name] = hits[name] + np.asarray(found, np.float64)
  return {name: found / len(labels) for name, found in hits.items()}


@functools.partial(jax.jit, static_argnames="columns")
def _hits(params, x, labels, columns):
  found = {}
  for name, start, stop in columns:
    logits = _logits(params[name], x[:, start:stop])
    # The lowest class of equal ones; a padding row's label is none.
    predicted = jnp.argmax(logits, axis=-1)
    found[name] = jnp.sum(predicted == labels[:, None], axis=0)
  return found


def scores(
  params: PyTree, data: Table, *, name: str, rate: int
) -> Float32[np.ndarray, "n c"]:
  """Logits of one head, of the place `rate` among the rates."""
  head = jax.tree.map(np.asarray, params[name])
  c = data.columns[name]
  head = {
    "kernel": head["kernel"][:, rate : rate + 1],
    "bias": head["bias"][rate : rate + 1],
  }
  found = [
    np.asarray(_one(head, data.x[s : s + _ROWS, c.start : c.stop]))[:, 0]
    for s in range(0, len(data.x), _ROWS)
  ]
  return np.concatenate(found)


def _logits(head, x):
  """`[n, rates, classes]`."""
  product = jnp.einsum(
    "nd,drc->nrc", x, head["kernel"], precision=jax.lax.Precision.HIGHEST
  )
  return product + head["bias"]


_one = jax.jit(_logits)
