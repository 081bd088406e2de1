"""Statistics that objectives fit to the run's own examples before step 0."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtv_jax.models.standardization import Moments
from mtv_jax.parallel.mesh import shard_batch
from mtv_jax.train.experiment import Experiment, make_loader
from mtv_jax.train.state import TrainState

log = logging.getLogger(__name__)


def fit_statistics(experiment: Experiment, state: TrainState) -> TrainState:
  """The state at step 0 with statistics of the first batches.

  They are part of the state: a run that resumes doesn't fit them again. Batches
  and crops are those of the first steps, whatever the mesh. Process 0 decides,
  as decompositions may differ between hosts.
  """
  spec, program = experiment.step_spec, experiment.program
  counts = {
    name: -(-objective.num_statistics_examples // experiment.config.batch_size)
    for name, objective in spec.objectives.items()
    if objective.num_statistics_examples
  }
  if not counts:
    return state
  log.info("Statistics of features: reads %d batches.", max(counts.values()))
  moments: dict[str, dict[str, Moments]] = {name: {} for name in counts}
  with make_loader(experiment, 0) as loader:
    for step in range(max(counts.values())):
      batch = shard_batch(next(loader), experiment.mesh)
      active = tuple(name for name, count in counts.items() if step < count)
      parts = jax.device_get(
        program.feature_moments(state, batch, np.int32(step), active)
      )
      for name, features in parts.items():
        for key, arrays in features.items():
          merge_parts(moments[name], key, arrays)
  fitted = dict(state.statistics)
  for name, of_features in moments.items():
    new = spec.objectives[name].fit_statistics(of_features)
    fitted[name] = {**fitted[name], **new}
  if jax.process_count() > 1:
    fitted = multihost_utils.broadcast_one_to_all(jax.device_get(fitted))
  statistics = jax.device_put(fitted, program.shardings.statistics)
  return state.replace(statistics=statistics)


def merge_parts(moments: dict[str, Moments], key: str, arrays: Any) -> None:
  """Adds the moments of the parts of a batch to those of `key`.

  `arrays` are count, mean and covariance: `[parts]`, `[parts, d]` and
  `[parts, d, d]`.
  """
  for part in zip(*map(np.float64, arrays), strict=True):
    new = Moments(float(part[0]), *part[1:])
    moments[key] = moments[key].merge(new) if key in moments else new
