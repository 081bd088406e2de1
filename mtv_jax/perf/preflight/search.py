"""Searches for what fits a chip: `model.remat="auto"`, and `--propose`.

The size and the recomputation cost of each array that a block can save
(`models/remat.py`) follow from its shape, for each trained encoding. The search
saves arrays by FLOPs per byte while they fit a capacity, compiles that choice,
and sets the next capacity from the compiler's peak.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from mtv_jax.config.sections import Config
from mtv_jax.models.remat import NAMES, Remat
from mtv_jax.objectives import base
from mtv_jax.parallel.distributed import gather_json
from mtv_jax.parallel.mesh import num_batch_shards
from mtv_jax.perf import flops as flops_lib
from mtv_jax.perf import topologies
from mtv_jax.perf.preflight import compile as compile_lib
from mtv_jax.train import forward as forward_lib
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.gradients import float_leaves
from mtv_jax.train.run import abstract_batch
from mtv_jax.train.spec import abstract_state
from mtv_jax.utils.errors import ConfigError

log = logging.getLogger(__name__)

# Share of a chip's memory to plan for; the rest is for allocator fragmentation
# and for evaluations between steps.
SHARE = 0.95
COMPILATIONS = 6
MAX_PROPOSALS = 8
_FACTORS = (2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Saving:
  """An array that the blocks of a view's encodings can save, on one chip."""

  view: str  # View or text field.
  name: str  # One of `remat.NAMES`.
  bytes: int
  flops: float  # Recomputation FLOPs that saving the array avoids.


def list_savings(plan: compile_lib.CompilePlan) -> list[Saving]:
  """Lists the arrays that a plan's blocks can save, most FLOPs per byte first.

  Sizes follow from shapes, without padding, and for whole rows: a `tensor` axis
  may split arrays further. Ties put the largest array first.
  """
  spec = plan.spec
  parts = num_batch_shards(plan.mesh) * plan.config.accumulate
  batch = abstract_batch(plan.config.batch_size // parts, plan.fields)
  state = abstract_state(spec, plan.optimizer.tx)
  views = jax.eval_shape(functools.partial(flops_lib.make_views, spec), batch)
  savings = []
  for encoding, layers in spec.plan.items():
    if encoding.weights != base.STUDENT:
      continue

    def measure(choice, encoding=encoding, layers=layers):
      """Saved bytes, and FLOPs of the value and its gradient."""
      spec_with_choice = dataclasses.replace(spec, remat=Remat(choice))

      def forward(params, views, batch):
        params = forward_lib.stop_gradient_frozen(spec, params)
        params = spec.merge_adapters(params)
        batch = {**batch, "views": views}
        plan = {encoding: layers}
        outputs = forward_lib.encode(
          spec_with_choice, params, {}, batch, plan=plan
        )
        return float_leaves(outputs)

      args = state.params, views, batch
      values, vjp_fn = jax.eval_shape(
        lambda params, *rest: jax.vjp(lambda p: forward(p, *rest), params),
        *args,
      )

      def value_and_gradient(values, params, *rest):
        return jax.vjp(lambda p: forward(p, *rest), params)[1](values)

      saved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(vjp_fn))
      return saved, flops_lib.count(value_and_gradient, values, *args).flops

    size, cost = measure("full")
    for name in NAMES:
      more, less = measure(name)
      savings.append(Saving(encoding.view, name, more - size, cost - less))
  return sorted(
    (s for s in merge_savings(savings) if s.bytes > 0 and s.flops > 0),
    # Rounded because gradients of biases differ slightly.
    key=lambda s: (-round(s.flops / s.bytes), -s.bytes, s.view, s.name),
  )


def merge_savings(savings: Iterable[Saving]) -> list[Saving]:
  """Sums savings by view and name: all encodings of a view share a choice."""
  sums: dict[tuple[str, str], Saving] = {}
  for s in savings:
    previous = sums.get((s.view, s.name), Saving(s.view, s.name, 0, 0.0))
    total = previous.bytes + s.bytes, previous.flops + s.flops
    sums[s.view, s.name] = Saving(s.view, s.name, *total)
  return list(sums.values())


def choose_savings(
  savings: Sequence[Saving], capacity: float | int
) -> tuple[Saving, ...]:
  """Greedily chooses savings that fit a capacity in bytes."""
  choice = []
  for saving in savings:
    if saving.bytes <= capacity:
      choice.append(saving)
      capacity -= saving.bytes
  return tuple(choice)


def format_choice(chosen: Sequence[Saving], savings: Sequence[Saving]) -> str:
  """Formats `config.model.remat` with an entry for every view."""
  if not chosen:
    return "full"
  entries = {view: [] for view in sorted({s.view for s in savings})}
  for saving in chosen:
    entries[saving.view].append(saving.name)
  names = {
    view: ",".join(sorted(arrays, key=NAMES.index)) or "full"
    for view, arrays in entries.items()
  }
  return str(Remat("full", names))


@dataclasses.dataclass(frozen=True)
class Trial:
  """A compiled choice."""

  remat: str  # The value of `config.model.remat`.
  saved: int  # Bytes saved beyond the blocks' inputs, without padding.
  flops: float  # Recomputation FLOPs avoided per chip and step.
  peak: int | None  # Bytes; None if the compiler did not report it.
  fits: bool  # Whether the peak is within the budget.

  def __str__(self) -> str:
    peak = "unknown" if self.peak is None else f"{self.peak / 2**30:.2f} GiB"
    verdict = "fits" if self.fits else "does not fit"
    return f"peak {peak}, {verdict}: {self.remat}"


def search_remat(
  savings: Sequence[Saving],
  measure_peak: Callable[[str], int | None],
  budget: int,
) -> Iterator[Trial]:
  """Compiles choices, starting at 'full', and closes in on the budget.

  `measure_peak` returns the bytes that a step with a `remat` needs, None if it
  does not fit and its size is unknown. Trials depend only on the peaks.
  """

  def compile_choice(choice):
    remat = format_choice(choice, savings)
    peak = measure_peak(remat)
    size = sum(s.bytes for s in choice)
    cost = sum((s.flops for s in choice), 0.0)
    return Trial(remat, size, cost, peak, peak is not None and peak <= budget)

  # `within` and `beyond`: the closest trials on either side of the budget.
  within = compile_choice(())
  yield within
  if not within.fits:
    return
  beyond, tried, growth = None, {within.remat}, 1.0
  while len(tried) < COMPILATIONS:
    capacity = within.saved + (budget - within.peak) / growth
    if beyond is not None and capacity >= beyond.saved:
      capacity = (within.saved + beyond.saved) / 2
    choice = choose_savings(savings, capacity)
    if format_choice(choice, savings) in tried:
      return
    trial = compile_choice(choice)
    yield trial
    tried.add(trial.remat)
    # Padding, and memory that is free at the peak, make growth differ from 1.
    if trial.peak and trial.peak > within.peak and trial.saved > within.saved:
      growth = (trial.peak - within.peak) / (trial.saved - within.saved)
    elif trial.fits:
      growth /= 2
    if not trial.fits:
      beyond = trial
    elif trial.saved > within.saved:
      within = trial


class Choice(NamedTuple):
  """Result of a search: the best fitting trial and its programs."""

  plan: compile_lib.CompilePlan
  compiled: compile_lib.CompileResult
  norms: compile_lib.CompileResult | None  # None if the run measures no norms.
  trials: tuple[Trial, ...]

  @property
  def remat(self) -> str:
    """The value of `config.model.remat`."""
    return self.plan.config.model.remat


def find_remat(
  config: Config | RunConfig,
  topology: topologies.Topology,
  *,
  budget: int | None = None,
  examples_per_epoch: int | None = None,
) -> Choice:
  """Finds the least recomputation within a budget by compiling the step.

  Also compiles the gradient-norm program if the run may measure norms. All
  processes must call this together, and agree on the largest peak. `budget` is
  in bytes per chip, by default `SHARE` of its memory.
  """
  limit = topology.chip.hbm_bytes
  if budget is None and limit is None:
    raise ConfigError(
      f"config.model.remat is 'auto', but the memory of {topology.chip.kind} "
      "is unknown. Pass a budget in GiB (mtv-jax preflight --budget), or set "
      "remat to 'none', 'full', or arrays to save."
    )
  if budget is not None and limit is not None and budget > limit:
    raise ConfigError(
      f"the budget is {budget / 2**30:.2f} GiB, more than the "
      f"{limit / 2**30:.2f} GiB of {topology.chip.kind}. By default, "
      f"{SHARE:.0%} of that is used."
    )
  budget = int(limit * SHARE) if budget is None else budget
  programs = {}

  def make_plan(remat):
    changes = [f"model.remat={remat}"]
    options = dict(examples_per_epoch=examples_per_epoch)
    return compile_lib.make_plan(config, topology, changes, **options)

  def measure_peak(remat):
    plan = make_plan(remat)
    compiled = compile_lib.compile_step(plan, explain=False)
    peak, norms = _agree_on_peak(compiled), None
    if plan.may_measure_norms and peak is not None and peak <= budget:
      norms = compile_lib.compile_norms(plan)
      norms_peak = _agree_on_peak(norms)
      peak = None if norms_peak is None else max(peak, norms_peak)
    programs[remat] = plan, compiled, norms
    return peak

  trials = []
  savings = list_savings(make_plan("full"))
  for trial in search_remat(savings, measure_peak, budget):
    log.info("remat: %s", trial)
    trials.append(trial)
  fitting = [trial for trial in trials if trial.fits]
  if not fitting:
    norms = programs[trials[0].remat][2]
    subject = "the step" if norms is None else "the program of gradient norms"
    raise ConfigError(
      f"config.model.remat is 'auto', and {subject} does not fit "
      f"{budget / 2**30:.2f} GiB with 'full' either. `mtv-jax preflight "
      "--propose --config.model.remat=full` compiles other changes."
    )
  best = max(fitting, key=lambda trial: trial.flops)
  return Choice(*programs[best.remat], tuple(trials))


def _agree_on_peak(compiled: compile_lib.CompileResult) -> int | None:
  """Returns the largest peak over all processes; None if one is unknown."""
  peaks = gather_json(compiled.required_bytes)
  return None if None in peaks else max(peaks)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """A config change and whether it fits."""

  changes: tuple[str, ...]  # 'KEY=VALUE' overrides.
  peak: int | None  # Bytes per chip; None if not reported.
  fits: bool

  def __str__(self) -> str:
    verdict = "fits" if self.fits else "does not fit"
    peak = f", {self.peak / 2**30:.2f} GiB" if self.peak else ""
    options = " ".join(f"--config.{change}" for change in self.changes)
    return f"{options}: {verdict}{peak}"


def list_candidates(
  config: RunConfig, chips: int
) -> Iterator[tuple[tuple[str, ...], int]]:
  """Lists changes, cheapest first: remat, fsdp, accumulation, batch size.

  Yields `('KEY=VALUE', ...)` overrides and the factor that divides activations.
  """
  prefix = ()
  if config.model.remat != "full":
    prefix = ("model.remat=full",)
    yield prefix, 1
  shards = max(chips // max(config.mesh.tensor, 1), 1)
  fsdp = config.mesh.fsdp
  if fsdp > 0 and config.mesh.data == -1:
    for factor in _FACTORS[1:4]:
      if shards % (fsdp * factor) == 0:
        yield (*prefix, f"mesh.fsdp={fsdp * factor}"), 1
  for factor in _FACTORS:
    parts = config.accumulate * factor
    if config.batch_size % (parts * shards) == 0:
      yield (*prefix, f"accumulate={parts}"), factor
  for factor in _FACTORS:
    size = config.batch_size // factor
    if size and size % (shards * config.accumulate) == 0:
      yield (*prefix, f"batch_size={size}"), factor


def propose(
  config: Config, topology: topologies.Topology
) -> Iterator[Proposal]:
  """Compiles changes of a config, at most `MAX_PROPOSALS`, until one fits.

  Skips changes that are too small according to the last compilation.
  """
  config = resolve(config)
  limit, excess, num_compiled = topology.chip.hbm_bytes, 1.0, 0
  for changes, factor in list_candidates(config, topology.chips):
    if 1 < factor < excess / 2:
      continue
    plan = compile_lib.make_plan(config, topology, changes)
    compiled = compile_lib.compile_step(plan, explain=False)
    required = compiled.required_bytes
    if factor == 1 and required and limit:
      excess = required / limit
    yield Proposal(changes, required, compiled.fits)
    num_compiled += 1
    if compiled.fits or num_compiled == MAX_PROPOSALS:
      return
