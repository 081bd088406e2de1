"""Training loop of probes: small heads on frozen features.

    fitted = probe.fit(loss, params, batches, optimizer=optax.sgd(0.1),
                       steps=1000, mesh=encoder.mesh)

`loss` is a pure function. `batches` is a function of the step that returns the
same arrays on every host, so that a fit depends on the seed alone and neither
on the devices nor on the hosts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Float32, Int, PyTree

from mtv_jax.encoder.batched import put_array
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  make_mesh,
  num_batch_shards,
  replicated_sharding,
)
from mtv_jax.utils.errors import InputError

Batch = Mapping[str, np.ndarray]
Arrays = Mapping[str, jax.Array | np.ndarray]
Batches = Callable[[int], Batch] | Iterable[Batch]
Loss = Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array], tuple]

# Passes over the training images that a schedule has at most by default, and
# the steps that a shortened one has at least, by smaller batches: our choice.
# The published schedules have 10 passes (DINOv2 on ImageNet) to 32 (DINOv3 on
# ADE20K).
MAX_PASSES, MIN_STEPS = 100, 300

# Steps in flight: the host prepares batches while the device works, and every
# step in flight holds its batch.
_MAX_IN_FLIGHT = 2


class Schedule(NamedTuple):
  """Length of a training, and why it has it, for the protocol."""

  steps: int
  batch_size: int
  why: str
  is_capped: bool = False


def resolve_schedule(
  published: tuple[int, int],
  *,
  images: int,
  steps: int | None = None,
  batch_size: int | None = None,
  in_full: bool = False,
) -> Schedule:
  """The given steps, or the published ones in at most `MAX_PASSES`.

  Args:
    published: steps and batch size of the published schedule.
    images: training images.
    steps, batch_size: those that a user gives; a given batch size stays.
    in_full: runs the published steps, however few images there are.
  """
  size = batch_size or published[1]
  if steps is not None:
    return Schedule(steps, size, "given")
  examples = MAX_PASSES * images
  if in_full or published[0] * size <= examples:
    return Schedule(published[0], size, "published")
  size = batch_size or min(size, max(1, examples // MIN_STEPS))
  return Schedule(
    min(published[0], -(-examples // size)),
    size,
    f"{MAX_PASSES} passes over {images} images, instead of {published[0]} "
    f"steps of {published[1]} (published=True)",
    is_capped=True,
  )


@dataclasses.dataclass(frozen=True)
class FitResult:
  """A trained head."""

  params: PyTree
  state: PyTree  # such as running statistics
  losses: Float32[np.ndarray, " steps"]  # before each update
  # (params, state) by number of updates.
  snapshots: dict[int, tuple[PyTree, PyTree]] = dataclasses.field(
    default_factory=dict
  )


def fit(
  loss: Loss,
  params: PyTree,
  batches: Batches,
  *,
  optimizer: optax.GradientTransformation,
  steps: int,
  state: PyTree = None,
  seed: int = 0,
  mesh: Mesh | None = None,
  snapshot_steps: Sequence[int] = (),
) -> FitResult:
  """Trains `params`; compiled once, in float32 at the highest precision.

  Args:
    loss: `loss(params, state, batch, rng) -> (scalar, new state)`. The scalar
      is over the whole batch: sharding changes no mean.
    params: float32 arrays; not modified.
    batches: `batches(step)`, or an iterable: dictionaries of arrays
      `[B, ...]`, all of one shape, the same on every host.
    optimizer, steps: the optimizer and the number of updates.
    state: arrays that `loss` carries from step to step, not trained.
    seed: seed of the key, folded with the step.
    mesh: shards the batch over its data axes, if they divide it; one device by
      default.
    snapshot_steps: numbers of updates after which to copy params and state to
      the host.

  Raises:
    InputError: for a step count below 1, for batches that end early, or if
      the loss is not finite.
  """
  if steps < 1:
    raise InputError(f"probe.fit: steps={steps}; expected at least 1")
  mesh = mesh or make_mesh({"data": 1}, jax.local_devices()[:1])
  batches = map(batches, range(steps)) if callable(batches) else iter(batches)
  # A copy, since the compiled step overwrites what it is given.
  params, state = jax.tree.map(jnp.array, (params, state))
  carry = replicate((params, state, optimizer.init(params)), mesh)
  update = _update(loss, optimizer, mesh)
  key = jax.random.key(seed)
  losses: list[jax.Array] = []
  snapshots: dict[int, tuple[PyTree, PyTree]] = {}
  for step in tqdm.trange(steps, desc="probe", leave=False, disable=None):
    batch = next(batches, None)
    if batch is None:
      raise InputError(f"probe.fit: batches end after {step} steps")
    batch = shard_batch(batch, mesh)
    rng = replicate(jax.random.key_data(jax.random.fold_in(key, step)), mesh)
    *carry, value = update(*carry, batch, rng)
    losses.append(value)
    if step + 1 in snapshot_steps:
      # Copies: the next step overwrites these arrays.
      snapshots[step + 1] = jax.tree.map(np.array, (carry[0], carry[1]))
    if step >= _MAX_IN_FLIGHT:
      losses[step - _MAX_IN_FLIGHT].block_until_ready()
  values = np.asarray([np.asarray(x) for x in losses], np.float32)
  bad = np.flatnonzero(~np.isfinite(values))
  if bad.size:
    raise InputError(
      f"probe.fit: the loss is {values[bad[0]]} at step {bad[0]} of {steps}. "
      "Lower the learning rate, or look for features that are not finite."
    )
  return FitResult(carry[0], carry[1], values, snapshots)


def _update(
  loss: Loss, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable:
  @functools.partial(
    jax.jit,
    donate_argnums=(0, 1, 2),
    out_shardings=replicated_sharding(mesh),
  )
  def update(params, state, moments, batch, rng):
    # float32 means float32: a TPU's default would multiply in bfloat16.
    with jax.default_matmul_precision("highest"):
      function = jax.value_and_grad(loss, has_aux=True)
      (value, state), grads = function(
        params, state, batch, jax.random.wrap_key_data(rng)
      )
    updates, moments = optimizer.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    return params, state, moments, value.astype(jnp.float32)

  return update


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
  """Shards arrays that every host holds in full over the mesh, by rows.

  An array whose rows the data axes do not divide is replicated.
  """
  parts, sharded = num_batch_shards(mesh), NamedSharding(mesh, BATCH_SPEC)

  def put(value: np.ndarray) -> jax.Array:
    splits = np.ndim(value) and len(value) % parts == 0
    return put_array(value, sharded if splits else replicated_sharding(mesh))

  return {name: put(value) for name, value in batch.items()}


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """Replicates arrays over the devices of the mesh."""
  sharding = replicated_sharding(mesh)
  return jax.tree.map(lambda leaf: put_array(leaf, sharding), tree)


def shuffled_batches(
  count: int, *, batch_size: int, seed: int = 0
) -> Callable[[int], Int[np.ndarray, " b"]]:
  """Item indices of each step's batch: epochs, each shuffled differently.

  A batch may span epochs, so that every item is seen equally often, and may be
  larger than the set.
  """
  if count < 1 or batch_size < 1:
    raise InputError(
      f"shuffled_batches: count={count}, batch_size={batch_size}; expected at "
      "least 1 of each"
    )

  @functools.lru_cache(maxsize=2 + batch_size // count)
  def epoch(number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(count)

  def indices(step: int) -> np.ndarray:
    start, stop = step * batch_size, (step + 1) * batch_size
    first, last = start // count, (stop - 1) // count
    items = np.concatenate([epoch(e) for e in range(first, last + 1)])
    return items[start - first * count : stop - first * count]

  return indices


def batch_norm_stats(width: int) -> dict[str, Float[Array, " d"]]:
  """Running statistics before the first batch: mean 0, variance 1."""
  return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def batch_norm_affine(width: int) -> dict[str, Float[Array, " d"]]:
  """Scale 1 and bias 0."""
  return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def batch_norm_train(
  x: Float[Array, "*n d"],
  stats: Arrays,
  *,
  affine: Arrays | None = None,
  momentum: float = 0.1,
  eps: float = 1e-5,
) -> tuple[Float[Array, "*n d"], dict[str, Float[Array, " d"]]]:
  """Normalised by the batch's own statistics, and the running ones updated.

  torch's conventions (Ioffe & Szegedy 2015): the batch is divided by its
  biased variance, the running variance collects the unbiased one, and the new
  value has the weight `momentum`. Over a sharded batch the statistics are the
  global batch's (SyncBN).

  Args:
    x: at least two vectors.
    stats: from `batch_norm_stats` or the step before.
    affine: from `batch_norm_affine`; none by default.
    momentum, eps: weight of the new statistics; added to the variance.
  """
  axes = tuple(range(x.ndim - 1))
  count = x.size // x.shape[-1]
  if count < 2:
    raise InputError(
      f"batch_norm_train: {list(x.shape)} has {count} vectors; statistics "
      "need at least 2"
    )
  mean = x.mean(axis=axes)
  var = jnp.mean(jnp.square(x - mean), axis=axes)
  new = {"mean": mean, "var": var * (count / (count - 1))}
  running = {k: (1 - momentum) * stats[k] + momentum * new[k] for k in new}
  return _normalized(x, mean, var, affine, eps), jax.lax.stop_gradient(running)


def batch_norm_eval(
  x: Float[Array, "*n d"],
  stats: Arrays,
  *,
  affine: Arrays | None = None,
  eps: float = 1e-5,
) -> Float[Array, "*n d"]:
  """Normalised by the running statistics."""
  return _normalized(x, stats["mean"], stats["var"], affine, eps)


def _normalized(x, mean, var, affine, eps):
  x = (x - mean) * jax.lax.rsqrt(var + eps)
  return x if affine is None else x * affine["scale"] + affine["bias"]
