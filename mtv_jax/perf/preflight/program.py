"""The program of a config on a machine that need not be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from mtv_jax.config import schema
from mtv_jax.data import ops, tokenizers
from mtv_jax.parallel.mesh import BATCH_SPEC
from mtv_jax.perf import topologies
from mtv_jax.train.experiment import (
  build_data_ops,
  build_program,
  build_step_spec,
  make_config_mesh,
)
from mtv_jax.train.step import Program
from mtv_jax.train.step_spec import StepSpec
from mtv_jax.utils.errors import ConfigError

# Of an epoch, where a config counts in epochs and nothing was said: it decides
# when things happen in a run, and nothing of what is measured here.
EPOCH = 1_000_000


@dataclasses.dataclass(frozen=True)
class Plan:
  """All that compiling the step of a config needs, nothing of it computed.

  Attributes:
    config: resolved.
    topology: what it is compiled for.
    recipe: what the step is made of.
    program: the step, and the shapes and shardings of its state.
    fields: of the batch, each with its row's shape and dtype.
    total_steps: of the run.
    examples_per_epoch: for durations in epochs, given or assumed.
  """

  config: ConfigDict
  topology: topologies.Topology
  recipe: StepSpec
  program: Program
  fields: Mapping[str, ops.Field]
  total_steps: int
  examples_per_epoch: int

  @property
  def mesh(self) -> Mesh:
    """Of all chips."""
    return self.program.mesh

  def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch, split over the mesh."""
    place = NamedSharding(self.mesh, BATCH_SPEC)
    rows = self.config.batch_size
    return {
      name: jax.ShapeDtypeStruct(
        (rows, *field.shape), field.dtype, sharding=place
      )
      for name, field in self.fields.items()
    }

  def lower(self) -> Any:
    """The lowered update with all objectives, as in the body of a run."""
    return self.program.compiled().lower(self.program.abstract, self.batch())

  @property
  def takes_norms(self) -> bool:
    """Whether a run measures each objective's gradient on the encoder."""
    every = schema.steps(
      "gradients",
      self.config.log,
      batch_size=self.config.batch_size,
      examples_per_epoch=self.examples_per_epoch,
      total_steps=self.total_steps,
      default=None,
    )
    return bool(every)

  def lower_norms(self) -> Any:
    """The lowered program of those norms; see `gradients.encoder_norms`."""
    active = tuple(self.recipe.objectives)
    return self.program.encoder_norms.lower(
      self.program.abstract, self.batch(), active
    )


def make_plan(
  config: schema.Config,
  topology: topologies.Topology,
  *,
  devices: Sequence[jax.Device] | None = None,
  examples_per_epoch: int | None = None,
) -> Plan:
  """Builds the step of a config; opens no data, no weights, no tokenizer.

  Args:
    config: as `train.run` takes it.
    topology: what to compile for.
    devices: those of the topology, or some of them; all by default.
    examples_per_epoch: for durations in epochs; assumed where not given.

  Raises:
    ConfigError: for anything in the config that can't be used.
  """
  config = schema.check_config(config)
  if devices is None:
    devices = topologies.devices(topology.name)
  mesh = make_config_mesh(config, devices)
  examples = examples_per_epoch or EPOCH
  total_steps = schema.total_steps(config, examples)
  recipe = build_step_spec(config, total_steps)
  # Any tokenizer will do: only the shapes count.
  tokenizer = tokenizers.build_tokenizer("bytes") if config.model.text else None
  fields = build_data_ops(config, recipe, tokenizer).fields
  for field, readers in recipe.fields().items():
    if field not in fields:
      raise ConfigError(
        f"objective {readers[0]!r} reads the batch field {field!r}, which no "
        f"op of config.data.ops gives; there are: {sorted(fields)}."
      )
  _, program = build_program(config, recipe, mesh, examples)
  return Plan(
    config=config,
    topology=topology,
    recipe=recipe,
    program=program,
    fields=fields,
    total_steps=total_steps,
    examples_per_epoch=examples,
  )
