"""Search for config changes that make a step fit, by compiling them."""

import dataclasses
from collections.abc import Iterator

from mtv_jax.config.sections import Config
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.train.run import RunConfig, resolve

_FACTORS = (2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A config change and whether it fits."""

  changes: tuple[str, ...]  # 'KEY=VALUE' overrides.
  peak: int | None  # Bytes per chip; None if the compiler did not say.
  fits: bool

  def __str__(self) -> str:
    verdict = "fits" if self.fits else "does not fit"
    peak = f", {self.peak / 2**30:.2f} GiB" if self.peak else ""
    options = " ".join(f"--config.{change}" for change in self.changes)
    return f"{options}: {verdict}{peak}"


def candidates(
  config: RunConfig, chips: int
) -> Iterator[tuple[tuple[str, ...], int]]:
  """Changes to try, cheapest first: remat, fsdp, accumulation, batch size.

  Yields 'KEY=VALUE' overrides and the factor by which they divide activations.
  """
  base = ()
  if config.model.remat != "full":
    base = ("model.remat=full",)
    yield base, 1
  shards = max(chips // max(config.mesh.tensor, 1), 1)
  fsdp = config.mesh.fsdp
  if fsdp > 0 and config.mesh.data == -1:
    for factor in _FACTORS[1:4]:
      if shards % (fsdp * factor) == 0:
        yield (*base, f"mesh.fsdp={fsdp * factor}"), 1
  for factor in _FACTORS:
    parts = config.accumulate * factor
    if config.batch_size % (parts * shards) == 0:
      yield (*base, f"accumulate={parts}"), factor
  for factor in _FACTORS:
    size = config.batch_size // factor
    if size and size % (shards * config.accumulate) == 0:
      yield (*base, f"batch_size={size}"), factor


def propose(
  config: Config, topology: topologies.Topology, *, tries: int = 8
) -> Iterator[Proposal]:
  """Compiles changes of a config until one fits.

  Yields every compiled proposal, at most `tries`. Skips changes that are too
  small according to the last compilation.
  """
  config = resolve(config)
  limit, excess = topology.chip.hbm_bytes, 1.0
  for changes, factor in candidates(config, topology.chips):
    if 1 < factor < excess / 2:
      continue
    plan = compile_lib.make_plan(config, topology, changes)
    compiled = compile_lib.compile_step(plan, explain=False)
    peak = compiled.memory.peak if compiled.memory else None
    needed = peak or compile_lib.required_bytes(compiled.refusal)
    if factor == 1 and needed and limit:
      excess = needed / limit
    yield Proposal(changes, needed, compiled.fits)
    tries -= 1
    if compiled.fits or not tries:
      return
