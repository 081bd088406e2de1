"""Training loop of probes: small heads on frozen features.

    fitted = probe.fit(loss, params, batches, optimizer=optax.sgd(0.1),
                       steps=1000, mesh=encoder.mesh)

`loss` is a pure function. `batches` maps a step to arrays that are equal on
every host, so that a fit depends on the seed, not on devices or hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float32, Int, PyTree

from mtv_jax.parallel import mesh as mesh_lib
from mtv_jax.utils import progress
from mtv_jax.utils.errors import InputError

log = logging.getLogger(__name__)

FeatureBatch = Mapping[str, np.ndarray]
Batches = Callable[[int], FeatureBatch] | Iterable[FeatureBatch]
ProbeLoss = Callable[[PyTree, PyTree, dict[str, jax.Array], jax.Array], tuple]

# Default maximum number of epochs, and minimum number of steps of a schedule
# capped by it, reached with smaller batches. Our choice; published schedules
# have 10 epochs (DINOv2 on ImageNet) to 32 (DINOv3 on ADE20K).
MAX_EPOCHS, MIN_STEPS = 100, 300

# Steps in flight: the host prepares batches while the device works. Each step
# in flight keeps its batch in memory.
_MAX_IN_FLIGHT = 2


class ProbeSchedule(NamedTuple):
  """Training length and the reason for it, for the protocol."""

  steps: int
  batch_size: int
  why: str
  is_capped: bool = False

  def warn(self, probe: str) -> None:
    """Warns if the schedule is shorter than the published one."""
    if self.is_capped:
      log.warning(
        "%s: trains %d steps of batch size %d, %s",
        probe, self.steps, self.batch_size, self.why,
      )  # fmt: skip


def resolve_schedule(
  published: tuple[int, int],
  *,
  images: int,
  steps: int | None = None,
  batch_size: int | None = None,
  uncapped: bool = False,
  scenes: tuple[int, int] | None = None,
) -> ProbeSchedule:
  """The user's steps, or the published ones capped at `MAX_EPOCHS` epochs.

  `published` are steps and batch size, which `steps` and `batch_size` override;
  `uncapped` runs all published steps, however few training images there are.
  `scenes`, set if the data are scenes, replaces them unless `uncapped`.
  """
  if scenes and not uncapped:
    return ProbeSchedule(steps or scenes[0], batch_size or scenes[1], "scenes")
  size = batch_size or published[1]
  if steps is not None:
    return ProbeSchedule(steps, size, "given")
  examples = MAX_EPOCHS * images
  if uncapped or published[0] * size <= examples:
    return ProbeSchedule(published[0], size, "published")
  size = batch_size or min(size, max(1, examples // MIN_STEPS))
  return ProbeSchedule(
    min(published[0], -(-examples // size)),
    size,
    f"{MAX_EPOCHS} passes over {images} images, instead of {published[0]} "
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
  loss: ProbeLoss,
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
  """Trains `params` in float32 at the highest matmul precision; compiles once.

  Args:
    loss: `loss(params, state, batch, rng) -> (scalar, new state)`. The scalar
      is computed on the global batch, so that sharding doesn't change it.
    params: float32 arrays; not modified.
    batches: `batches(step)`, or an iterable: dictionaries of arrays
      `[B, ...]` of constant shape, equal on every host.
    state: non-trainable arrays that `loss` carries from step to step.
    seed: seed of the key, into which the step is folded.
    mesh: shards the batch over its data axes if they divide it; one device by
      default.
    snapshot_steps: update counts at which to copy params and state to the host.
  """
  if steps < 1:
    raise InputError(f"probe.fit: steps={steps}; expected at least 1")
  mesh = mesh or mesh_lib.make_mesh({"data": 1}, jax.local_devices()[:1])
  batches = map(batches, range(steps)) if callable(batches) else iter(batches)
  # A copy, since the compiled step donates its inputs.
  params, state = jax.tree.map(jnp.array, (params, state))
  carry = mesh_lib.replicate((params, state, optimizer.init(params)), mesh)
  update = _make_update_fn(loss, optimizer, mesh)
  key = jax.random.key(seed)
  losses: list[jax.Array] = []
  snapshots: dict[int, tuple[PyTree, PyTree]] = {}
  for step in progress.track(range(steps), "probe", unit="steps"):
    batch = next(batches, None)
    if batch is None:
      raise InputError(f"probe.fit: batches end after {step} steps")
    batch = mesh_lib.shard_replicated(batch, mesh)
    rng = jax.random.key_data(jax.random.fold_in(key, step))
    rng = mesh_lib.replicate(rng, mesh)
    *carry, loss_value = update(*carry, batch, rng)
    losses.append(loss_value)
    if step + 1 in snapshot_steps:
      # Copies: the next step donates these arrays.
      snapshots[step + 1] = jax.tree.map(np.array, (carry[0], carry[1]))
    if step >= _MAX_IN_FLIGHT:
      _check_finite(losses, step - _MAX_IN_FLIGHT, steps)
  for step in range(max(0, steps - _MAX_IN_FLIGHT), steps):
    _check_finite(losses, step, steps)
  values = np.asarray([np.asarray(x) for x in losses], np.float32)
  return FitResult(carry[0], carry[1], values, snapshots)


def _check_finite(losses: Sequence[jax.Array], step: int, steps: int) -> None:
  """Waits for a step's loss; raises InputError if it isn't finite."""
  if not np.isfinite(value := np.asarray(losses[step])):
    raise InputError(
      f"probe.fit: the loss is {value} at step {step} of {steps}. "
      "Lower the learning rate, or look for non-finite features."
    )


def _make_update_fn(
  loss: ProbeLoss, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable:
  sharding = mesh_lib.replicated_sharding(mesh)

  @functools.partial(jax.jit, donate_argnums=(0, 1, 2), out_shardings=sharding)
  def update(params, state, opt_state, batch, rng):
    # TPUs multiply float32 in bfloat16 by default.
    with jax.default_matmul_precision("highest"):
      grad_fn = jax.value_and_grad(loss, has_aux=True)
      (value, state), grads = grad_fn(
        params, state, batch, jax.random.wrap_key_data(rng)
      )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, state, opt_state, value.astype(jnp.float32)

  return update


def shuffled_batches(
  count: int, *, batch_size: int, seed: int = 0
) -> Callable[[int], Int[np.ndarray, " b"]]:
  """Item indices of each step's batch, reshuffled every epoch.

  A batch may span epochs, so that items are seen equally often, and may be
  larger than the set.
  """
  if count < 1 or batch_size < 1:
    got = f"count={count}, batch_size={batch_size}"
    raise InputError(f"shuffled_batches: {got}; expected at least 1 of each")

  @functools.lru_cache(maxsize=2 + batch_size // count)
  def shuffle_epoch(epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)

  def indices(step: int) -> np.ndarray:
    start, stop = step * batch_size, (step + 1) * batch_size
    first, last = start // count, (stop - 1) // count
    items = np.concatenate([shuffle_epoch(e) for e in range(first, last + 1)])
    return items[start - first * count : stop - first * count]

  return indices
