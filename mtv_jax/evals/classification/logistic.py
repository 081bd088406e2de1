"""Logistic regression on frozen features, over a sweep of C (DINOv2, DINOv3).

    minimize  1/n sum_i cross_entropy(x_i W + b, y_i) + |W|^2 / (2 C n)

by L-BFGS for 45 log-spaced values of C, 1e-6 to 1e5. The bias is not
regularised. Each fit starts from the solution of the next smaller C, which
saves time; the problem is convex, so the optimum is unchanged. As in DINOv2's
`log_regression.py`, features are raw, C is the best on a random tenth of the
training images, and the classifier is fitted again on all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int

from mtv_jax.config.options import PositiveFloat, PositiveInt
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification.probe_evaluators import (
  Evaluation,
  FeatureProbe,
  Select,
  score_accuracies,
  split_for_selection,
)
from mtv_jax.evals.core.examples import Splits
from mtv_jax.parallel import mesh as mesh_lib

STRENGTHS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))
_LOGIT_BYTES = 2**26  # bytes of a block of logits on a device
# Steps without a decrease after which a float32 fit counts as converged.
_PATIENCE = 5


@dataclasses.dataclass(frozen=True)
class Logistic(FeatureProbe):
  """L2-regularised logistic regression, with the best C of a sweep.

  Attributes:
    strengths: values of C; 45 from 1e-6 to 1e5 by default, every fifth on
      scenes.
    max_iter: L-BFGS iterations per C.
    tolerance: a fit ends when no entry of the gradient is larger, or when the
      objective stops decreasing. (Published: 1e-12, in float64.)
    normalize: `l2` normalises features, `raw` does not.
    select: images for selecting C, see `split_for_selection`; unless they are
      the test images, the best C is fitted again on all training images.
  """

  published_view: ClassVar[str] = "shortest"

  strengths: tuple[PositiveFloat, ...] | None = None
  max_iter: PositiveInt = 1000
  tolerance: PositiveFloat = 1e-7
  normalize: Literal["l2", "raw"] = "raw"
  select: Select = "train_tenth"

  def _evaluate(self, encoder: Encoder, data: Splits) -> Evaluation:
    strengths = sorted(self._resolve(self.strengths, STRENGTHS, STRENGTHS[::5]))
    transform = normalize if self.normalize == "l2" else np.asarray
    x = transform(self._features(encoder, data.train))
    test = transform(self._features(encoder, data.test))
    train, held_out, selection = split_for_selection(data, self.select)
    validation, labels = test, data.test.labels
    if held_out is not None:
      validation, labels = x[held_out], data.train.labels[held_out]
      selection += ", then all"
    fit = functools.partial(
      sweep,
      classes=data.classes,
      max_iter=self.max_iter,
      tolerance=self.tolerance,
      mesh=getattr(encoder, "mesh", None),
    )
    models = fit(x[train], data.train.labels[train], strengths)
    penalty = data.penalty if held_out is None else 0
    top1 = [
      float(np.mean((m.scores(validation) + penalty).argmax(1) == labels))
      for m in models
    ]
    best_index = int(np.argmax(top1))
    model = models[best_index]
    if held_out is not None:
      (model,) = fit(x, data.train.labels, [strengths[best_index]])
    return score_accuracies(model.scores(test), data), {
      "feature": self.feature,
      "head": "logistic regression, L2 on the weights, none on the bias",
      "normalize": self.normalize,
      "optimizer": "L-BFGS, memory 10, float32, each from the smaller C's end",
      "strengths": strengths,
      "max_iter": self.max_iter,
      "tolerance": self.tolerance,
      "iterations": [m.iterations for m in models],
      "selection": selection,
      "selected": {"C": strengths[best_index]},
      "top1_where_selected": top1,
      "ties": "the lowest class and C of equal ones",
    }


class Model(NamedTuple):
  """A fitted classifier; `strength` is C, `iterations` counts L-BFGS steps."""

  kernel: Float32[np.ndarray, "d c"]
  bias: Float32[np.ndarray, " c"]
  strength: float
  iterations: int

  def scores(self, x: Float[np.ndarray, "n d"]) -> Float32[np.ndarray, "n c"]:
    """Logits."""
    return x.astype(np.float32) @ self.kernel + self.bias


def sweep(
  x: Float32[np.ndarray, "n d"],
  labels: Int[np.ndarray, " n"],
  strengths: Sequence[float],
  *,
  classes: int,
  max_iter: int = 1000,
  tolerance: float = 1e-7,
  mesh: Mesh | None = None,
) -> list[Model]:
  """Fits a model for each C; increasing values converge fastest.

  Logits are computed in blocks of rows to save memory. Features must be equal
  on every host; rows are sharded over the mesh.
  """
  mesh = mesh or mesh_lib.make_mesh({"data": 1}, jax.local_devices()[:1])
  data = _shard_blocks(x, labels, classes, mesh)
  kernel = np.zeros((x.shape[1], classes), np.float32)
  params = {"kernel": kernel, "bias": np.zeros(classes, np.float32)}
  params = mesh_lib.replicate(params, mesh)
  minimize = jax.jit(
    functools.partial(_minimize, max_iter=max_iter),
    out_shardings=mesh_lib.replicated_sharding(mesh),
  )
  models = []
  for c in strengths:
    hyperparams = np.asarray([1 / (c * len(x)), tolerance], np.float32)
    hyperparams = mesh_lib.replicate(hyperparams, mesh)
    params, iterations = minimize(params, data, hyperparams)
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    models.append(Model(kernel, bias, float(c), int(iterations)))
  return models


def _shard_blocks(
  x: np.ndarray, labels: np.ndarray, classes: int, mesh: Mesh
) -> dict[str, jax.Array]:
  """Blocks `[blocks, rows, ...]`, with rows sharded over the mesh."""
  shards = mesh_lib.num_batch_shards(mesh)
  rows = min(-(-len(x) // shards), max(1, _LOGIT_BYTES // (4 * classes)))
  rows *= shards
  padding = -len(x) % rows
  padded = {
    "x": np.pad(x, ((0, padding), (0, 0))),
    "label": np.pad(labels, (0, padding)),
    "weight": np.pad(np.full(len(x), 1 / len(x), np.float32), (0, padding)),
  }
  sharding = NamedSharding(mesh, PartitionSpec(None, *mesh_lib.BATCH_SPEC))
  return {
    name: mesh_lib.put_array(v.reshape(-1, rows, *v.shape[1:]), sharding)
    for name, v in padded.items()
  }


def _minimize(params, data, hyperparams, max_iter):
  """L-BFGS until the gradient is small or the objective stops decreasing."""
  l2, tolerance = hyperparams
  optimizer = optax.lbfgs(memory_size=10)
  objective = functools.partial(_objective, data=data, l2=l2)
  evaluate = optax.value_and_grad_from_state(objective)

  def step(carry):
    params, state, count, lowest, num_stale = carry
    value, grad = evaluate(params, state=state)
    updates, state = optimizer.update(
      grad, state, params, value=value, grad=grad, value_fn=objective
    )
    params = optax.apply_updates(params, updates)
    new_value = optax.tree.get(state, "value")
    num_stale = jnp.where(new_value < lowest, 0, num_stale + 1)
    return params, state, count + 1, jnp.minimum(new_value, lowest), num_stale

  def should_continue(carry):
    _, state, count, _, num_stale = carry
    grads = jax.tree.leaves(optax.tree.get(state, "grad"))
    max_grad = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in grads]))
    more = (max_grad > tolerance) & (count < max_iter) & (num_stale < _PATIENCE)
    return (count == 0) | more

  with jax.default_matmul_precision("highest"):
    init = (params, optimizer.init(params), 0, jnp.inf, 0)
    params, _, count, _, _ = jax.lax.while_loop(should_continue, step, init)
  return params, count


def _objective(params, data, l2):
  @jax.checkpoint
  def add_block(total, rows):
    logits = rows["x"] @ params["kernel"] + params["bias"]
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = cross_entropy(logits, rows["label"])
    return total + jnp.sum(losses * rows["weight"]), None

  total, _ = jax.lax.scan(add_block, jnp.zeros(()), data)
  return total + 0.5 * l2 * jnp.sum(jnp.square(params["kernel"]))
