"""Measurements of the objectives' gradients on the image encoder.

Interference compares the gradients of each pair of objectives: their cosine by
encoder block, and the transfer from objective i to j, with theta_i the encoder
after a step along the gradient of objective i,

  transfer[i][j] = 1 - L_j(theta_i) / L_j(theta)

(Fifty et al. 2021, equation 1, on the step's batch and crops). Fifty et al.
step by `lr * g_i`, their optimizer's update. Our optimizers are scale free, so
we chose a step of length `lr * |theta|`, the trust ratio of LARS (You et al.
2017).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from mtv_jax.config.durations import Duration, PositiveDuration
from mtv_jax.objectives.base import Batch
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.train.gradients import (
  compute_encoder_grad_norms,
  compute_encoder_gradients,
  compute_objective_losses,
)
from mtv_jax.train.hooks import Hook
from mtv_jax.train.spec import StepSpec, TrainState
from mtv_jax.train.step import TrainStep
from mtv_jax.utils.tree import flatten_with_names

if TYPE_CHECKING:
  from mtv_jax.train.train_loop import Trainer

log = logging.getLogger(__name__)

# The image encoder's parameters after its blocks; the rest precede the blocks.
_AFTER_BLOCKS = r"^(norm|pool(_norm)?|projection)/"


@dataclasses.dataclass(frozen=True)
class InterferenceConfig:
  """`config.interference`."""

  every: PositiveDuration = Duration(100)  # Interval between measurements.
  transfer: bool = True  # Whether to measure transfer too.


def block_names(depth: int) -> list[str]:
  """Names of the encoder's blocks, in the order of `block_products`."""
  return ["embedding", *map(str, range(depth)), "pool"]


def stack_trees(trees: Sequence[PyTree]) -> PyTree:
  """Stacks the leaves of equal trees along a new first axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def block_products(stacked: PyTree) -> Float[Array, "o o b"]:
  """Inner products of O gradients on an image encoder, by block.

  Leaves of `stacked` are [O, ...]. Blocks are the embedding with prefix tokens,
  each stacked block, and the final norm with the pooling.
  """
  sums: dict[str, Any] = dict(embedding=0.0, blocks=0.0, pool=0.0)
  for name, leaf in flatten_with_names(stacked):
    if name.startswith("blocks/"):
      block, batch = "blocks", (1,)
    else:
      block = "pool" if re.search(_AFTER_BLOCKS, name) else "embedding"
      batch = ()
    contracting = tuple(range(1 + len(batch), leaf.ndim))
    axes = (contracting, contracting), (batch, batch)
    sums[block] += jax.lax.dot_general(
      leaf, leaf, axes, precision="highest"
    )  # [depth, O, O] or [O, O]
  blocks = jnp.moveaxis(sums["blocks"], 0, -1)
  ends = sums["embedding"][:, :, None], sums["pool"][:, :, None]
  return jnp.concatenate([ends[0], blocks, ends[1]], axis=-1)


def measure_interference(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  lr: Float[Array, ""] | None = None,
  mesh: Mesh | None = None,
) -> dict[str, Array]:
  """Compares the gradients of the spec's O objectives on B blocks.

  Returns `norms` `[O, B]` of the weighted gradients, `cosines` `[O, O, B]` (0
  if a gradient is 0), `weights` `[O]` and unweighted `losses` `[O]`. If `lr`
  is set, also returns `transfer` `[O, O]` of the unweighted losses (0 if the
  gradient or the loss is 0), which takes O + 1 more forward passes.
  """
  losses, grads = compute_encoder_gradients(spec, state, batch, mesh)
  weights = spec.loss_weights(state)
  weights = jnp.stack([weights[name] for name in spec.objectives])  # [O]
  products = block_products(stack_trees([grads[n] for n in spec.objectives]))
  norms = jnp.sqrt(jnp.einsum("iib->ib", products))
  scale = norms[:, None] * norms[None]  # [O, O, B]
  cosines = jnp.where(
    scale > 0, products / jnp.where(scale > 0, scale, 1.0), 0.0
  )
  result = dict(
    norms=weights[:, None] * norms,
    cosines=jnp.clip(cosines, -1.0, 1.0),
    weights=weights,
    losses=jnp.stack([losses[name] for name in spec.objectives]),
  )
  if lr is not None:
    result["transfer"] = _compute_transfer(spec, state, batch, grads, lr, mesh)
  return result


def _compute_transfer(
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  grads: Mapping[str, PyTree],
  lr: Float[Array, ""],
  mesh: Mesh | None,
) -> Float[Array, "o o"]:
  """Relative decrease of each loss after a step down each gradient."""
  encoder = state.params["image"]
  length = lr * optax.tree.norm(encoder)

  def take_step(grad):
    norm = optax.tree.norm(grad)
    scale = jnp.where(norm > 0, length / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda p, g: p - scale * g, encoder, grad)

  def compute_losses(encoder):
    params = {**state.params, "image": encoder}
    losses = compute_objective_losses(spec, params, state, batch, mesh)
    return jnp.stack([losses[name] for name in spec.objectives])

  # The loop includes the unchanged encoder, so that rounding is equal.
  encoders = [encoder, *(take_step(grads[name]) for name in spec.objectives)]
  losses = jax.lax.map(compute_losses, stack_trees(encoders))  # [1 + O, O]
  before, after = losses[0], losses[1:]
  has_loss = before != 0
  ratio = after / jnp.where(has_loss, before, 1.0)
  return jnp.where(has_loss, 1.0 - ratio, 0.0)


def conflict_share(
  cosines: Float[np.ndarray, "o o b"], norms: Float[np.ndarray, "o b"]
) -> float:
  """The share of (pair, block) entries whose cosine is negative.

  Ignores entries with a zero gradient; 0 if no entry remains.
  """
  first, second = np.triu_indices(len(norms), k=1)
  is_counted = (norms[first] > 0) & (norms[second] > 0)  # [pairs, B]
  is_negative = cosines[first, second] < 0
  return float((is_negative & is_counted).sum() / max(is_counted.sum(), 1))


def interference_row(
  names: Sequence[str], measured: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """A measurement as a row of `interference.jsonl`, without the step."""
  cosines, norms = measured["cosines"], measured["norms"]
  return {
    "objectives": list(names),
    "blocks": block_names(norms.shape[1] - 2),
    "conflicts": conflict_share(cosines, norms),
    **measured,
  }


def interference_scalars(
  measured: Mapping[str, np.ndarray],
) -> dict[str, float]:
  """Summarises a measurement as metrics.

  The share of conflicts, the mean and minimum cosine of two gradients on the
  whole encoder, and the mean transfer between two objectives.
  """
  cosines, norms = measured["cosines"], measured["norms"]
  scalars = {"interference/conflicts": conflict_share(cosines, norms)}
  pairs = np.triu_indices(len(norms), k=1)
  products = np.einsum("ijb,ib,jb->ij", cosines, norms, norms)[pairs]
  lengths = np.sqrt(np.square(norms).sum(axis=1))  # [O]
  scale = np.outer(lengths, lengths)[pairs]
  encoder_cosines = products[scale > 0] / scale[scale > 0]
  if encoder_cosines.size:
    scalars["interference/cosine_mean"] = float(encoder_cosines.mean())
    scalars["interference/cosine_min"] = float(encoder_cosines.min())
  if "transfer" in measured and len(norms) > 1:
    off_diagonal = ~np.eye(len(norms), dtype=bool)
    transfer = measured["transfer"][off_diagonal].mean()
    scalars["interference/transfer_mean"] = float(transfer)
  return scalars


class GradientMeasurements:
  """The compiled measurements of a program."""

  def __init__(self, train_step: TrainStep):
    self._train_step = train_step

  @functools.cached_property
  def encoder_grad_norms(self) -> Any:
    """`(state, batch, active) -> {name: norm}`, jitted."""
    return self._jit(compute_encoder_grad_norms)

  @functools.cached_property
  def interference(self) -> Any:
    """`(state, batch, active, lr) -> arrays`, see `measure_interference`."""
    return self._jit(
      measure_interference, replicated_sharding(self._train_step.mesh)
    )

  def _jit(self, measure: Any, *in_shardings: Any) -> Any:
    train_step = self._train_step

    def measure_active(spec, state, batch, *args):
      return measure(spec, state, batch, *args, mesh=train_step.mesh)

    out_shardings = replicated_sharding(train_step.mesh)
    return train_step.jit(measure_active, out_shardings, *in_shardings)

  @functools.cached_property
  def _observe(self) -> Any:
    def observe(balance, norms, step):
      spec = self._train_step.spec
      weights = spec.config_weights(step)
      return spec.balance.observe(balance, norms, weights, step)

    return jax.jit(observe, out_shardings=self._train_step.shardings.balance)

  def update_balance(
    self, state: TrainState, norms: Mapping[str, Array]
  ) -> TrainState:
    """Updates the balancing state from measured `encoder_grad_norms`."""
    balance = self._observe(state.balance, norms, state.step)
    return state.replace(balance=balance)

  def measure_norms(
    self, state: TrainState, batch: Any, active: tuple[str, ...]
  ) -> dict[str, float]:
    """Each objective's gradient norm on a batch, as metrics.

    Takes more memory than an update; returns {} if the devices lack it.
    """
    try:
      return norm_metrics(self.encoder_grad_norms(state, batch, active))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      log.warning(
        "The objectives' gradient norms are unknown: measuring them takes"
        f" more memory than available. {str(error).splitlines()[0]}"
      )
      return {}

  def measure_interference(
    self, state: TrainState, batch: Any, active: tuple[str, ...], lr: Any
  ) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """Returns a row of `interference.jsonl`, its metrics, and norms by name."""
    measured = jax.device_get(self.interference(state, batch, active, lr))
    norms = np.linalg.norm(measured["norms"], axis=1)
    row = interference_row(active, measured)
    norms_by_name = dict(zip(active, norms, strict=True))
    return row, interference_scalars(measured), norms_by_name


class MeasureGradients(Hook):
  """Measures gradient norms and interference at their intervals.

  Updates the balance, and writes `interference.jsonl`.
  """

  def before_update(
    self, trainer: Trainer, step: int, batch: Any
  ) -> dict[str, Any]:
    run, config = trainer.run, trainer.run.config
    balances = is_balance_due(run.spec, step - 1)
    interference = config.interference
    compares = run.is_due(interference and interference.every, step)
    if not (balances or compares or run.is_due(config.log.gradients, step)):
      return {}
    values, args = {}, (trainer.state, batch, trainer.active)
    with trainer.pause_timers("measure"):
      if compares:
        lr = None
        if interference.transfer:
          lr = np.float32(run.optimizer.schedule(step - 1))
        measure = trainer.measurements.measure_interference
        row, values, norms = measure(*args, lr)
        trainer.writer.write_row("interference", step, row)
      else:
        norms = trainer.measurements.encoder_grad_norms(*args)
      if balances:
        update_balance = trainer.measurements.update_balance
        trainer.state = update_balance(trainer.state, norms)
      return {**norm_metrics(norms), **values}


def norm_metrics(norms: Mapping[str, Any]) -> dict[str, float]:
  """Gradient norms as metrics `NAME/encoder_grad_norm`."""
  norms = jax.device_get(norms)
  return {f"{n}/encoder_grad_norm": float(v) for n, v in norms.items()}


def is_balance_due(spec: StepSpec, step: int) -> bool:
  """Whether the balance reads norms before update `step`, counted from 0."""
  if spec.balance.every_steps is None:
    return False
  starts = {weight.start for weight in spec.weights.values()}
  return step in starts or step % spec.balance.every_steps == 0
