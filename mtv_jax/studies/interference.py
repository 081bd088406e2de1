"""Interference of a run's objectives at its checkpoints, over many batches.

The gradient of one batch is mostly noise, and so is the cosine of two. Here
each objective's gradient on the image encoder is averaged over k batches, in
disjoint sets; `report/interference.py` computes the estimates.

The transfer is measured on different batches than the gradients. With a step of
length h along a unit vector d, and L the loss on one batch and its crops,

  slope      (L(theta + h d) - L(theta - h d)) / 2 = h d.grad L + O(h^3)
  curvature  (L(theta + h d) + L(theta - h d)) / 2 - L(theta)

in units of the mean L(theta). A step along -d lowers the loss by slope minus
curvature. Controls have the same length: each gradient with its entries
permuted within tensor and block, and a normal vector, resampled per batch.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree
from ml_collections import ConfigDict

from mtv_jax.checkpoint.checkpointer import restore_from
from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config import overrides
from mtv_jax.parallel.mesh import (
  BATCH_SPEC,
  num_batch_shards,
  replicated_sharding,
)
from mtv_jax.report.interference import (
  ENCODER,
  GradientMoments,
  Interval,
  batches_needed,
  corrected_cosines,
  extrapolate,
  noise_cosines,
  reliability,
  to_lists,
)
from mtv_jax.report.run_folders import (
  INTERFERENCE,
  INTERFERENCE_FORMAT,
  read_checkpoint_interference,
)
from mtv_jax.train.gradients import (
  compute_encoder_gradients,
  compute_objective_losses,
)
from mtv_jax.train.measurements import block_names, block_products
from mtv_jax.train.run import Run, make_loader, open_run
from mtv_jax.train.runtime.prefetch import prefetch_to_device
from mtv_jax.train.spec import TrainState
from mtv_jax.train.workdir import CHECKPOINTS, read_recorded_config
from mtv_jax.utils import path as path_lib
from mtv_jax.utils import progress, xla_flags
from mtv_jax.utils.errors import InputError
from mtv_jax.utils.tree import map_with_names

log = logging.getLogger(__name__)


# Numbers of disjoint sets of batches, and of batches split into halves.
_NUM_SETS, _NUM_HALVED = 16, 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the measurement at a checkpoint."""

  batches: int = 256  # Maximum batches of gradients, at least one per set.
  reliability: float = 0.5  # Required for the mean over half of them.
  transfer: int = 16  # Batches on which the transfer is measured; 0: none.
  length: float | None = None  # Step over |theta|; None: peak learning rate.

  def __post_init__(self):
    if self.batches < _NUM_SETS or self.transfer == 1:
      raise InputError(
        f"batches={self.batches}, transfer={self.transfer}: expected at least"
        f" {_NUM_SETS} batches of gradients, and 0 or 2+ for the transfer."
      )
    if not 0 < self.reliability < 1:
      raise InputError(
        f"reliability is {self.reliability}; expected a number between 0 and 1."
      )


def measure_run(
  workdir: str | os.PathLike,
  steps: Sequence[int] = (),
  settings: Settings | None = None,
  changes: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
  """Measures a run at its checkpoints; yields what `measure` returns.

  Writes `interference/STEP.json` into the run's folder and skips steps whose
  file has the same settings. `steps` are by default the saved ones nearest to a
  tenth, half and all of the last one. `changes` override the config, as
  KEY=VALUE. For a run without checkpoints, such as an archived one, yields the
  stored measurements. Raises InputError if a step has neither.
  """
  settings = settings or Settings()
  saved = saved_steps(workdir)
  if not saved:
    yield from _read_stored(workdir, steps)
    return
  if missing := sorted({*steps} - {*saved}):
    raise InputError(
      f"{workdir} has no checkpoint of step {missing[0]}, only {saved}. Train"
      " with config.checkpoint.keep_every to keep more."
    )
  early, middle, late = (
    min(saved, key=lambda step, target=share * saved[-1]: abs(step - target))
    for share in (0.1, 0.5, 1.0)
  )
  steps = sorted({*steps} or {early, middle, late})
  checkpoints = path_lib.as_path(workdir) / CHECKPOINTS
  run = None
  for step in steps:
    file = path_lib.as_path(workdir) / INTERFERENCE / f"{step}.json"
    expected_settings = dict(dataclasses.asdict(settings), changes=[*changes])
    stored = path_lib.read_json(file)
    if isinstance(stored, dict) and stored.get("settings") == expected_settings:
      log.info("%s exists; not measured again.", file)
      yield stored
      continue
    if run is None:  # Compiles once for all steps.
      recorded = read_recorded_config(workdir) | {"evals": {}}
      config = overrides.override(ConfigDict(recorded), changes)
      run = open_run(config, workdir)
      meter = Meter(run, settings)
    activity = f"measuring step {step}"
    with progress.activity(activity), xla_flags.silence_slow_compile_alarm():
      saved = restore_from(checkpoints, run.train_step.abstract, step)
      result = meter.measure(saved.state, step)
    result = (
      dict(format=INTERFERENCE_FORMAT, settings=expected_settings) | result
    )
    path_lib.write_bytes(file, json.dumps(result).encode())
    yield result


def _read_stored(
  workdir: str | os.PathLike, steps: Sequence[int]
) -> Iterator[dict[str, Any]]:
  """The stored measurements of `steps`, by default all."""
  rows = read_checkpoint_interference(path_lib.as_path(workdir))
  by_step = {row["step"]: row for row in rows}
  if not by_step:
    raise InputError(f"{workdir} has neither checkpoints nor measurements.")
  if missing := sorted({*steps} - {*by_step}):
    raise InputError(
      f"{workdir} has no checkpoints, and no measurement of step {missing[0]},"
      f" only {[*by_step]}."
    )
  for step in sorted({*steps} or by_step):
    log.info(
      "Step %d was measured with %s.", step, by_step[step].get("settings")
    )
    yield by_step[step]


class Meter:
  """Compiled measurements of a run, on one host."""

  def __init__(self, run: Run, settings: Settings):
    self.run, self.settings = run, settings
    train_step = self.train_step = run.train_step
    replicated = replicated_sharding(train_step.mesh)

    def grad_fn(spec, state, batch, step):
      state = at_step(state, step)
      _, grads = compute_encoder_gradients(spec, state, batch, train_step.mesh)
      return [grads[name] for name in spec.objectives]

    def loss_fn(spec, state, batch, step, direction, length):
      state = at_step(state, step)
      image = jax.tree.map(
        lambda p, d: p + length * d, state.params["image"], direction
      )
      params = {**state.params, "image": image}
      values = compute_objective_losses(
        spec, params, state, batch, train_step.mesh
      )
      return jnp.stack([values[name] for name in spec.objectives])

    def at_step(state, step):  # Selects the step's crops.
      return state.replace(step=step)

    encoder = train_step.shardings.params["image"]
    self.gradients = train_step.jit(grad_fn, replicated, replicated)
    self.losses = train_step.jit(
      loss_fn, replicated, replicated, encoder, replicated
    )

  def measure(self, state: TrainState, step: int) -> dict[str, Any]:
    """Measures the state after `step` updates on the batches that follow.

    Returns JSON. Arrays are by objective O and block or encoder B:
    `reliability` [O][B] of means over some numbers of `batches`,
    `mean_reliability` over half of all, `batches_needed`, `told` (whether that
    mean is reliable), `cosines` and `noise_cosines` [O][O][B], and `transfer`.
    """
    state = self.train_step.copy_teachers(state, step)
    active = self.train_step.spec.active_objectives(step)
    with make_loader(self.run, step) as loader:
      batches = prefetch_to_device(loader, self.run.mesh)
      inputs = (
        (state, batch, np.int32(step + i)) for i, batch in enumerate(batches)
      )
      sets, gradients = self.measure_gradients(inputs, active)
      result = dict(
        step=step,
        objectives=[*active],
        blocks=[*block_names(sets.depth), ENCODER],
        batch_size=self.run.config.batch_size,
        **gradients,
      )
      if self.settings.transfer:
        means = [sets.mean(i) for i in range(len(active))]
        result["transfer"] = self.measure_transfer(inputs, active, means)
    return result

  def measure_gradients(
    self, inputs: Iterator[tuple[Any, ...]], active: tuple[str, ...]
  ) -> tuple["GradientSets", dict[str, Any]]:
    """Averages gradients over sets of batches.

    Doubles the number of batches until the mean over half of them has the
    required reliability for every objective, or the maximum is reached.
    """
    settings, config = self.settings, self.run.config
    sets, reliabilities, halves = GradientSets(_NUM_SETS), [], []
    divisor = 2 * config.accumulate * num_batch_shards(self.run.mesh)
    max_halves = 0 if config.batch_size % divisor else _NUM_HALVED
    split = NamedSharding(self.run.mesh, BATCH_SPEC)
    while True:
      for _ in range(max(sets.batches, _NUM_SETS)):
        state, batch, step = next(inputs)
        sets.add(self.gradients(state, batch, active, step))
        if len(halves) < max_halves:
          half_sets = GradientSets(2)
          for k in range(2):  # Each half with another step's crops.
            half = {n: x[k::2] for n, x in batch.items()}
            half = jax.device_put(half, split)
            half_sets.add(self.gradients(state, half, active, step + k))
          halves.append(half_sets.products())
      moments = GradientMoments.of_sets(sets.products())
      per_set = sets.batches // _NUM_SETS
      of_set = moments.estimate(reliability)
      reliabilities.append(dict(batches=per_set, **of_set.to_dict()))
      of_mean = of_set.map(extrapolate(_NUM_SETS / 2))
      is_reliable = (of_mean.value > settings.reliability) & (of_set.low > 0)
      is_done = (is_reliable | np.isnan(of_mean.value))[:, -1].all()
      log.info("Gradients of %d batches.", sets.batches)
      if is_done or 2 * sets.batches > settings.batches:
        break
    if halves:
      of_half = GradientMoments.of_halves(np.stack(halves)).estimate(
        reliability
      )
      reliabilities.insert(0, dict(batches=0.5, **of_half.to_dict()))
    num_needed = of_set.map(batches_needed(per_set, settings.reliability))
    return sets, dict(
      batches=sets.batches,
      reliability=reliabilities,
      mean_reliability=of_mean.to_dict(),
      batches_needed=num_needed.to_dict(),
      told=is_reliable.tolist(),
      cosines=moments.estimate(corrected_cosines).to_dict(),
      noise_cosines=moments.estimate(noise_cosines).to_dict(),
    )

  def measure_transfer(
    self,
    inputs: Iterator[tuple[Any, ...]],
    active: tuple[str, ...],
    gradients: Sequence[PyTree],
  ) -> dict[str, Any]:
    """Measures losses along mean gradients and controls; returns JSON."""
    length, rows = self.settings.length, []
    if length is None:
      steps = np.linspace(0, self.run.total_steps, 201)
      length = max(map(float, map(self.run.optimizer.schedule, steps)))
    for _ in range(self.settings.transfer):
      state, batch, step = next(inputs)
      norm = tree_norm(jax.device_get(state.params["image"]))
      args = state, batch, active, step

      def losses_at(direction, scale, args=args):
        losses = self.losses(*args, direction, np.float32(scale))
        return np.asarray(losses, float)

      rng = np.random.default_rng([self.run.config.seed, int(step)])
      directions = (*gradients, *draw_controls(rng, gradients))
      rows.append(compare_losses(losses_at, directions, length * norm))
    shuffled = [f"{name}, shuffled" for name in active]
    directions = [*active, *shuffled, "random"]
    return dict(length=length, directions=directions, **summarize_changes(rows))


def compare_losses(
  losses_at: Callable[[PyTree, float], np.ndarray],
  directions: Iterable[PyTree],
  length: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Losses `[O]`, and slopes and curvatures `[D, O]` along D directions.

  `losses_at(direction, scale)` returns the losses with `scale` times the
  direction added to the encoder. Each direction is scaled to norm `length`.
  """
  base, slopes, curvatures = None, [], []
  for direction in directions:
    if base is None:
      base = losses_at(direction, 0.0)
    scale = length / (tree_norm(direction) or 1.0)
    plus, minus = losses_at(direction, scale), losses_at(direction, -scale)
    slopes.append((plus - minus) / 2)
    curvatures.append((plus + minus) / 2 - base)
  return base, np.stack(slopes), np.stack(curvatures)


def summarize_changes(
  batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, Any]:
  """Summarizes `compare_losses` of several batches, relative to mean losses.

  `fall` is slope minus curvature, the decrease by a step along -direction.
  """
  losses, slope, curvature = map(np.stack, zip(*batches, strict=True))
  mean = losses.mean(axis=0)
  scale = np.where(mean == 0, np.nan, np.abs(mean))
  changes = dict(slope=slope, curvature=curvature, fall=slope - curvature)
  estimates = {k: Interval.of_mean(x / scale) for k, x in changes.items()}
  return dict(
    losses=to_lists(mean), **{k: e.to_dict() for k, e in estimates.items()}
  )


class GradientSets:
  """Sums of O gradients over disjoint sets of batches, in host memory."""

  def __init__(self, sets: int):
    self._sets, self.batches = sets, 0
    self._sums: PyTree = None  # Leaves [S, O, ...].

  def add(self, gradients: Sequence[PyTree]) -> None:
    """Adds a batch's gradients to the next set."""
    gradients = jax.device_get(gradients)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)
    if self._sums is None:
      self._sums = jax.tree.map(
        lambda x: np.zeros((self._sets, *x.shape), x.dtype), stacked
      )
    trees = map(jax.tree.leaves, (self._sums, stacked))
    for total, new in zip(*trees, strict=True):
      total[self.batches % self._sets] += new
    self.batches += 1

  @property
  def depth(self) -> int:
    """Number of the encoder's blocks."""
    return jax.tree.leaves(self._sums["blocks"])[0].shape[2]

  def products(self) -> np.ndarray:
    """Inner products of the sets' mean gradients, `[S, O, S, O, B]`."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self._sums)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      products = np.asarray(jax.jit(block_products)(flat), float)
    shape = 2 * (self._sets, len(products) // self._sets)
    return products.reshape(*shape, -1) / (self.batches / self._sets) ** 2

  def mean(self, objective: int) -> PyTree:
    """The mean gradient of an objective."""
    return jax.tree.map(
      lambda x: x[:, objective].sum(axis=0) / self.batches, self._sums
    )


def tree_norm(tree: PyTree) -> float:
  """Norm of a tree of host arrays, in float64."""
  squares = (np.square(x, dtype=float).sum() for x in jax.tree.leaves(tree))
  return float(np.sqrt(sum(squares)))


def draw_controls(
  rng: np.random.Generator, gradients: Sequence[PyTree]
) -> Iterator[PyTree]:
  """Each gradient with its entries permuted, then a normal vector.

  Entries stay in their tensor and block. The normal vector is 0 where all
  gradients are 0, such as frozen parameters.
  """

  def permute(name, leaf):
    rows = len(leaf) if name.startswith("blocks/") else 1
    return rng.permuted(leaf.reshape(rows, -1), axis=1).reshape(leaf.shape)

  def draw(*leaves):
    normal = rng.standard_normal(leaves[0].shape, dtype=np.float32)
    return normal * np.any(leaves, axis=0)

  for gradient in gradients:
    yield map_with_names(permute, gradient)
  yield jax.tree.map(draw, *gradients)
