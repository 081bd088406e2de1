"""Studies: which objectives help, alone and together, and how models scale.

  mtv-jax study ladder --config=mtv_tiny --output=studies/ladder --dry_run
  mtv-jax study ladder --config=mtv_tiny --output=studies/ladder --seeds=3
  mtv-jax study pairs --config=mine.py --output=studies/pairs --budget=0.25
  mtv-jax study scaling --config=mtv_tiny --output=studies/scaling \\
    --models mu/8 Ti/8 --images 5000 20000
  mtv-jax study balance --config=mtv_tiny --output=studies/balance \\
    --weights equal:depth=1,contrastive=1
  mtv-jax study custom --config=mtv_tiny --output=studies/terms \\
    --arms=terms.json --seeds=5
  mtv-jax study power --output=studies/pilot --effect=3
  mtv-jax study predict --output=studies/scaling --arm=large-20000
  mtv-jax study coordinates --config=mtv_tiny --output=studies/widths \\
    --set='model.mup=dict(base_width=64)' --models w64:width=64 w128:width=128
  mtv-jax study rates --config=mtv_tiny --output=studies/rates --steps=500 \\
    --set='model.mup=dict(base_width=64)' --models w64:width=64 w96:width=96 \\
    --rates 1e-3 2e-3 4e-3

Expands a config into runs, trains them one by one and reports their
evaluations. `power` prints how many seeds an effect needs, from the spread of a
trained study; `predict` writes predictions for an arm of a scaling study before
its first run; `coordinates` is the coordinate check of muP, and `rates`
compares losses over learning rates with muP and without. Rerunning the command
resumes. Several runners may share the folder; --index selects the runs of each.
Exit status: 0; 1 if a run or the report failed; 2 for a wrong command line; 143
after SIGTERM.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Literal

import jax

from mtv_jax.cli import arguments
from mtv_jax.cli.errors import format_error
from mtv_jax.perf.flops import count_flops_per_image
from mtv_jax.studies import (
  arms,
  coordinates,
  expand,
  learning_rates,
  page,
  predictions,
  runner,
  statistics,
)
from mtv_jax.utils.errors import ConfigError, UserError

_POWER, _PREDICT = "power", "predict"
_COORDINATES, _RATES = "coordinates", "rates"
# Kinds that train no runs, and the options that they read, besides `config`.
_ANALYSES = {
  _POWER: ("effect",),
  _PREDICT: ("arm",),
  _COORDINATES: ("models", "seeds", "steps"),
  _RATES: ("models", "rates", "seeds", "steps"),
}

_ANALYSIS_OPTIONS = ("effect", "arm", "rates", "steps")


class Flags(arguments.ConfigFlags):
  """Flags of `mtv-jax study`.

  Args:
    config: recipe file or name, with its arguments after a colon; not for
      `power` and `predict`.
    output: the study's folder.
    seeds: number of seeds, for all arms or by arm: 3, or vl:5,depth:5,3.
    match: budget that all runs share: images seen (default) or FLOPs.
    budget: factor of the config's steps, 0.25 or 2; scales its schedules.
    groups: objective groups in order, such as vl,depth; default: all.
    models: (scaling, coordinates, rates) variants, or NAME:KEY=VALUE,... of
      config.model.
    images: (scaling) numbers of distinct images.
    methods: (balance) methods of config.balance, separated by commas.
    weights: (balance) further arms, NAME:OBJECTIVE=WEIGHT,...
    arms: (custom) JSON file of overrides by arm, {NAME: [OVERRIDE, ...]}; the
      first arm is the baseline, and `family` lists tested comparisons.
    family: tested comparisons, ARM:BASELINE,...; default: the `family` of
      --arms, or each arm with the first, or A+B with A and B. Fixed by the
      first command.
    effect: (power) effect in the metric's unit, points for %; default: the
      difference of each comparison.
    arm: (predict) the arm to predict from the finished ones.
    predict_from: folders of studies; before the first run, predicts each arm
      from its shorter runs in them.
    rates: (rates) learning rates.
    steps: (coordinates, rates) steps to train.
    index: train only run I, from 0; I/N trains every N-th run from I on.
    dry_run: print the runs with images, FLOPs and estimated time; train
      nothing.
  """

  config: str = ""
  output: str
  seeds: str = "1"
  match: Literal[expand.MATCHES] = expand.MATCHES[0]
  budget: float = 1.0
  groups: str = ""
  models: Sequence[str] = ()
  images: Sequence[int] = ()
  methods: str = ""
  weights: Sequence[str] = ()
  arms: str = ""
  family: str = ""
  effect: float | None = None
  arm: str = ""
  predict_from: Sequence[str] = ()
  rates: Sequence[float] = ()
  steps: int = 10
  index: str | None = None
  dry_run: bool = False


def _split_names(text: str) -> tuple[str, ...]:
  return tuple(filter(None, text.split(",")))


def run(kind: Literal[(*arms.KINDS, *_ANALYSES)], /, args: Flags) -> int:
  """Expands and trains a study and reports; returns the exit status.

  Args:
    kind: kind of study, or power, predict, coordinates or rates.
  """
  _check_options(kind, args)
  if kind not in (_POWER, _PREDICT) and not args.config:
    raise ConfigError(f"study {kind} needs --config=RECIPE.")
  if kind in _ANALYSES:
    print(_run_analysis(kind, args))
    return 0
  runner.check_index(args.index)  # Before the FLOPs are counted.
  log = functools.partial(print, flush=True)
  if not args.dry_run:
    # Leaves the accelerator to the runs, which are separate processes.
    jax.config.update("jax_platforms", "cpu")
  folder = pathlib.Path(args.output)
  options = arms.Options(
    groups=_split_names(args.groups),
    models=tuple(args.models),
    images=tuple(args.images),
    methods=_split_names(args.methods),
    weights=tuple(args.weights),
    arms=args.arms,
  )
  study = expand.expand(
    kind,
    args.config,
    assignments=args.set,
    options=options,
    seeds=args.seeds,
    match=args.match,
    budget=args.budget,
    family=args.family,
    cost_fn=count_flops_per_image,
    costs=runner.known_costs(folder),
  )
  runner.select_runs(study.runs, args.index)  # Before the study is recorded.
  for note in study.notes:
    log(note)
  log(runner.format_runs(folder, study, measure=args.dry_run))
  if args.dry_run:
    return 0
  has_family = args.family or arms.read_family(options)
  runner.write(folder, study, keeps_family=not has_family)
  if args.predict_from:
    shorter = [*map(pathlib.Path, args.predict_from)]
    log(f"wrote {predictions.predict_longer_runs(folder, study, shorter)}")
  status = runner.run_study(folder, study, index=args.index, log_fn=log)
  for name, reason in status.failed.items():
    print(f"study: {name} failed: {reason}", file=sys.stderr)
  # If several runners share the study, the last one has all results.
  is_last = status.finished and not status.leased
  is_reported = write_report(folder, log) if is_last else True
  return 1 if status.failed or not is_reported else 0


def _check_options(kind: str, args: Flags) -> None:
  """Raises ConfigError for an option that the kind would ignore."""
  options = _ANALYSES.get(kind)
  for field in dataclasses.fields(args):
    name, value = field.name, getattr(args, field.name)
    is_shared = name in ("config", "set", "output")
    if is_shared or not value or value == field.default:
      continue
    is_option = name in options if options else name not in _ANALYSIS_OPTIONS
    if not is_option:
      raise ConfigError(f"--{name} is not an option of study {kind}.")


def _run_analysis(kind: str, args: Flags) -> str:
  """Runs one of `_ANALYSES`; returns the text to print."""
  folder = pathlib.Path(args.output)
  if kind in (_COORDINATES, _RATES):
    compare = coordinates.check_coordinates
    if kind == _RATES:
      compare = functools.partial(learning_rates.compare_rates, args.rates)
    config = arguments.read_config(args)
    options = dict(steps=args.steps, seeds=args.seeds)
    files = compare(config, args.models, folder, **options)
    return "wrote " + ", ".join(map(str, files))
  if kind == _PREDICT:
    return f"wrote {predictions.write_predictions(folder, args.arm)}"
  if args.effect is not None and not 0 < args.effect < math.inf:
    raise ConfigError(f"--effect={args.effect}: expected a number above 0.")
  return statistics.format_power(statistics.read_study(folder), args.effect)


def write_report(folder: pathlib.Path, log: Callable[[str], None]) -> bool:
  """Writes the report; prints errors only, since the runs are complete."""
  try:
    log("wrote " + ", ".join(map(str, page.write_study(folder))))
    return True
  except (UserError, OSError) as error:
    print(f"study: no report: {format_error(error)}", file=sys.stderr)
  except Exception:
    print("study: no report:", file=sys.stderr)
    traceback.print_exc()
  return False
