"""Search for the least recomputation that fits a chip (`model.remat="auto"`).

Each array that a block can save (`models/remat.py`), of each encoding that is
trained, has a size and a cost of recomputation, both from its shapes. Arrays
are taken by FLOPs per byte as long as they fit a capacity. The compiler says
what a choice needs, from which the next capacity follows.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

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
from mtv_jax.train.gradients import float_leaves
from mtv_jax.train.run import RunConfig
from mtv_jax.train.spec import abstract_state
from mtv_jax.utils.errors import ConfigError

log = logging.getLogger(__name__)

# Share of a chip's memory to plan for: the rest is for the fragmentation of its
# allocator, and for evaluations between steps.
SHARE = 0.95
COMPILATIONS = 6


@dataclasses.dataclass(frozen=True)
class Saving:
  """An array that the blocks of a view's encodings can save, on one chip."""

  view: str  # Or a text field.
  name: str  # One of `remat.NAMES`.
  bytes: int
  flops: float  # That are not recomputed if it is saved.


def list_savings(plan: compile_lib.Plan) -> list[Saving]:
  """What a plan's blocks can save, most FLOPs per byte first.

  By shape, without padding and on whole rows: over a `tensor` axis some arrays
  are split further. Of equal ones the larger is first, so that smaller ones
  fill what is left.
  """
  spec = plan.step_spec
  parts = num_batch_shards(plan.mesh) * plan.config.accumulate
  batch = flops_lib.abstract_batch(plan.config.batch_size // parts, plan.fields)
  state = abstract_state(spec, plan.optimizer.tx)
  views = jax.eval_shape(functools.partial(flops_lib.make_views, spec), batch)
  savings = []
  for encoding, taps in spec.plan.items():
    if encoding.weights != base.STUDENT:
      continue

    def measure(choice, encoding=encoding, taps=taps):
      """Bytes that are saved, and FLOPs of the value and its gradient."""
      chosen = dataclasses.replace(spec, remat=Remat(choice))

      def forward(params, views, batch):
        params = forward_lib.stop_gradient_frozen(spec, params)
        batch = {**batch, "views": views}
        plan = {encoding: taps}
        outputs = forward_lib.encode(chosen, params, {}, batch, plan=plan)
        return float_leaves(outputs)

      args = state.params, views, batch
      values, pull = jax.eval_shape(
        lambda params, *rest: jax.vjp(lambda p: forward(p, *rest), params),
        *args,
      )

      def value_and_gradient(values, params, *rest):
        return jax.vjp(lambda p: forward(p, *rest), params)[1](values)

      saved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pull))
      return saved, flops_lib.count(value_and_gradient, values, *args).flops

    size, cost = measure("full")
    for name in NAMES:
      more, less = measure(name)
      savings.append(Saving(encoding.view, name, more - size, cost - less))
  return sorted(
    (s for s in merge_savings(savings) if s.bytes > 0 and s.flops > 0),
    # Rounded, as the gradients of biases differ.
    key=lambda s: (-round(s.flops / s.bytes), -s.bytes, s.view, s.name),
  )


def merge_savings(savings: Iterable[Saving]) -> list[Saving]:
  """The sums by view and name: a choice is that of all encodings of a view."""
  sums: dict[tuple[str, str], Saving] = {}
  for s in savings:
    key = s.view, s.name
    before = sums.get(key, Saving(*key, 0, 0.0))
    sums[key] = Saving(*key, before.bytes + s.bytes, before.flops + s.flops)
  return list(sums.values())


def choose_savings(
  savings: Sequence[Saving], capacity: float | int
) -> tuple[Saving, ...]:
  """The first savings that fit a capacity in bytes, leaving out larger ones."""
  chosen = []
  for saving in savings:
    if saving.bytes <= capacity:
      chosen.append(saving)
      capacity -= saving.bytes
  return tuple(chosen)


def format_choice(chosen: Sequence[Saving], savings: Sequence[Saving]) -> str:
  """Some of all savings as a value of `config.model.remat`.

  Each view has its entry, since that of 'image' would be its tower's.
  """
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
  """A choice that was compiled."""

  remat: str  # The value of `config.model.remat`.
  saved: int  # Bytes by shape that it saves beside the blocks' inputs.
  flops: float  # Of a chip's step, that it does not recompute.
  peak: int | None  # Bytes; None if the compiler did not say.
  fits: bool  # Whether the peak is within the budget.

  def __str__(self) -> str:
    peak = "unknown" if self.peak is None else f"{self.peak / 2**30:.2f} GiB"
    verdict = "fits" if self.fits else "does not fit"
    return f"peak {peak}, {verdict}: {self.remat}"


def search(
  savings: Sequence[Saving],
  measure_peak: Callable[[str], int | None],
  budget: int,
  *,
  compilations: int = COMPILATIONS,
) -> Iterator[Trial]:
  """Compiles choices, from 'full' on, toward the budget from both sides.

  Yields each trial; they are a function of the peaks alone. `measure_peak`
  gives the bytes that the step with a `remat` needs; None if that is unknown
  and too much.
  """

  def compile_choice(chosen):
    remat = format_choice(chosen, savings)
    peak = measure_peak(remat)
    size = sum(s.bytes for s in chosen)
    cost = sum((s.flops for s in chosen), 0.0)
    return Trial(remat, size, cost, peak, peak is not None and peak <= budget)

  # The trials next to the budget. All savings are beyond it until they fit.
  fits = compile_choice(())
  yield fits
  if not fits.fits:
    return
  beyond, tried, growth = None, {fits.remat}, 1.0
  while len(tried) < compilations:
    capacity = fits.saved + (budget - fits.peak) / growth
    if beyond is not None and capacity >= beyond.saved:
      capacity = (fits.saved + beyond.saved) / 2
    chosen = choose_savings(savings, capacity)
    if format_choice(chosen, savings) in tried:
      return
    trial = compile_choice(chosen)
    yield trial
    tried.add(trial.remat)
    # Arrays are padded, and some take memory that is free at the peak.
    if trial.peak and trial.peak > fits.peak and trial.saved > fits.saved:
      growth = (trial.peak - fits.peak) / (trial.saved - fits.saved)
    elif trial.fits:
      growth /= 2
    if not trial.fits:
      beyond = trial
    elif trial.saved > fits.saved:
      fits = trial


@dataclasses.dataclass(frozen=True)
class Choice:
  """Result of a search: the best trial that fits, and its programs."""

  plan: compile_lib.Plan
  compiled: compile_lib.CompileResult
  norms: compile_lib.CompileResult | None  # None if the run measures none.
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
  """Finds what recomputes least within a budget, by compiling the step.

  And the gradient norms, if the run may measure them: it needs the memory of
  the larger program. Processes call it together. Each compiles, as XLA may
  share the search for kernels between processes, and the largest peak of all
  counts, so that all find the same.

  The budget is in bytes of a chip; `SHARE` of its memory by default.
  """
  limit = topology.chip.hbm_bytes
  if budget is None and limit is None:
    raise ConfigError(
      f"config.model.remat is 'auto', and the memory of {topology.chip.kind} "
      "is unknown. Give a budget in GiB (mtv-jax preflight --budget), or set "
      "remat to 'none', 'full', or arrays to save."
    )
  if budget is not None and limit is not None and budget > limit:
    raise ConfigError(
      f"the budget is {budget / 2**30:.2f} GiB, more than the "
      f"{limit / 2**30:.2f} GiB of {topology.chip.kind}. Without one, "
      f"{SHARE:.0%} of them are planned for."
    )
  budget = int(limit * SHARE) if budget is None else budget
  programs = {}

  def make_plan(remat):
    return compile_lib.make_plan(
      config,
      topology,
      [f"model.remat={remat}"],
      examples_per_epoch=examples_per_epoch,
    )

  def measure_peak(remat):
    plan = make_plan(remat)
    compiled = compile_lib.compile_step(plan, explain=False)
    peak, norms = _agree_on_peak(compiled), None
    if plan.runs_norms and peak is not None and peak <= budget:
      norms = compile_lib.compile_norms(plan)
      more = _agree_on_peak(norms)
      peak = None if more is None else max(peak, more)
    programs[remat] = plan, compiled, norms
    return peak

  trials = []
  for trial in search(list_savings(make_plan("full")), measure_peak, budget):
    log.info("remat: %s", trial)
    trials.append(trial)
  fitting = [trial for trial in trials if trial.fits]
  if not fitting:
    norms = programs[trials[0].remat][2]
    what = "the step" if norms is None else "the program of gradient norms"
    raise ConfigError(
      f"config.model.remat is 'auto', and {what} does not fit "
      f"{budget / 2**30:.2f} GiB with 'full' either. `mtv-jax preflight "
      "--propose --config.model.remat=full` compiles other changes."
    )
  best = max(fitting, key=lambda trial: trial.flops)
  return Choice(*programs[best.remat], tuple(trials))


def _agree_on_peak(compiled: compile_lib.CompileResult) -> int | None:
  """The largest peak of a program in all processes; None if one is unknown."""
  if compiled.memory is None:
    peak = compile_lib.required_bytes(compiled.refusal)
  else:
    peak = compiled.memory.peak
  peaks = gather_json(peak)
  return None if None in peaks else max(peaks)
