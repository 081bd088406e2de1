"""What would fit where a config does not: tried, not guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mtv_jax.config import overrides, schema
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import measure as measure_lib
from mtv_jax.perf.preflight import program

# Of memory, beside what it takes.
_FACTORS = (2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A change of the config, and what compiling it said.

  Attributes:
    changes: 'KEY=VALUE', as `--config.KEY=VALUE` takes them.
    peak: bytes a chip that it needs at least; None where that was not said.
    fits: whether that is within the chip's memory.
  """

  changes: tuple[str, ...]
  peak: int | None
  fits: bool

  def __str__(self) -> str:
    verdict = "fits" if self.fits else "does not fit"
    peak = f", {self.peak / 2**30:.2f} GiB" if self.peak else ""
    options = " ".join(f"--config.{change}" for change in self.changes)
    return f"{options}: {verdict}{peak}"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A change to try, and by how much it cuts the activations."""

  changes: tuple[str, ...]
  factor: int = 1


def candidates(config: schema.Config, chips: int) -> Iterator[Candidate]:
  """Changes to try, in order: remat, fsdp, parts of the batch, its size."""
  config = schema.check_config(config)
  base = ()
  if config.model.remat != "full":
    base = ("model.remat=full",)
    yield Candidate(base)
  shards = max(chips // max(config.mesh.tensor, 1), 1)
  fsdp = config.mesh.fsdp
  if fsdp > 0 and config.mesh.data == -1:
    for factor in _FACTORS[1:4]:
      if shards % (fsdp * factor) == 0:
        yield Candidate((*base, f"mesh.fsdp={fsdp * factor}"))
  for factor in _FACTORS:
    parts = config.accumulate * factor
    if config.batch_size % (parts * shards) == 0:
      yield Candidate((*base, f"accumulate={parts}"), factor)
  for factor in _FACTORS:
    size = config.batch_size // factor
    if size and size % (shards * config.accumulate) == 0:
      yield Candidate((*base, f"batch_size={size}"), factor)


def propose(
  config: schema.Config,
  topology: str,
  *,
  found: int = 1,
  tries: int = 8,
) -> list[Proposal]:
  """Compiles changes of a config until some of them fit.

  Changes that can't be enough, by what the last refusal asked for, are left
  out.

  Args:
    config: one that does not fit.
    topology: see `topologies.parse`.
    found: how many that fit are enough.
    tries: how many to compile at most.

  Returns:
    All that were tried, in order.
  """
  parsed = topologies.parse(topology)
  limit = parsed.chip.hbm_bytes
  tried, excess = [], 1.0
  for candidate in candidates(config, parsed.chips):
    enough = sum(proposal.fits for proposal in tried) >= found
    if enough or len(tried) >= tries:
      break
    if 1 < candidate.factor < excess / 2:
      continue
    changed = overrides.override(schema.check_config(config), candidate.changes)
    measured = measure_lib.measure(
      program.make_plan(changed, parsed), largest=0
    )
    peak = measured.memory.peak if measured.memory else None
    needed = peak or measure_lib.required(measured.refusal)
    if candidate.factor == 1 and needed and limit:
      excess = needed / limit
    tried.append(Proposal(candidate.changes, needed, measured.fits))
  return tried
