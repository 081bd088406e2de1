"""Expands a config into the runs of a study.

An arm is one setting of a study: a set of objectives, a model and a number of
images, or a balancing method. Each arm is trained with several seeds. A run is
the study's config with `mtv-jax train` overrides, so its command repeats it.

Runs of one seed share initial parameters, data order and crops: their random
keys fold in the seed and names, never the set of objectives.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import mtv_jax
from mtv_jax.config import overrides as overrides_lib
from mtv_jax.config import recipes, sections
from mtv_jax.config.durations import UNITS, RunLength
from mtv_jax.hooks.evaluation import build_evaluators, evaluable
from mtv_jax.perf.flops import build_all_objectives_spec
from mtv_jax.report.contrasts import MIN_SEEDS
from mtv_jax.studies import arms as arms_lib
from mtv_jax.studies import lengths
from mtv_jax.studies.arms import Arm
from mtv_jax.train.config import RunConfig, resolve
from mtv_jax.train.optim.optimizer import make_optimizer
from mtv_jax.train.optim.param_rules import match_param_rules
from mtv_jax.train.run import build_prediction_heads
from mtv_jax.train.spec import abstract_params
from mtv_jax.utils.errors import (
  ConfigError,
  InputError,
  UserError,
  check_choice,
  did_you_mean,
)
from mtv_jax.utils.tree import flatten_with_names, select_names

FORMAT = 1
_MAX_BUDGET = 1000.0  # Times the config's steps.
MATCHES = ("images", "flops")
# Images per evaluation sheet, unless the config sets it.
SHEET_IMAGES = 4
# Settings that don't change the FLOPs of a step.
_NOT_COUNTED = (
  *("seed", "schedule", "evals", "checkpoint", "log", "weights"),
  *(f"total_{unit}" for unit in UNITS[:3]),
)

# Maps a run's resolved config to training FLOPs per image.
CostFn = Callable[[Mapping[str, Any]], float]


@dataclasses.dataclass(frozen=True)
class StudyRun:
  """One run of a study."""

  name: str  # name of the run's folder
  arm: str
  seed: int
  overrides: tuple[str, ...]  # applied to the study's config
  steps: int
  settings: Mapping[str, Any]  # the resolved config, as in `config.json`
  flops: float | None = None  # training FLOPs; None if not counted

  @property
  def images(self) -> int:
    """Number of images seen."""
    return self.steps * self.settings["batch_size"]


@dataclasses.dataclass(frozen=True)
class ComparisonFamily:
  """The tests of a study, written before its first run.

  Attributes:
    comparisons: (arm, baseline) pairs.
    evaluations: names of the evaluations whose main metrics are tested.
    seeds: planned number of seeds by arm.
    test: the test and its correction, for readers of `study.json`.
    num_started_runs: runs in the study's folder when this was written.
  """

  comparisons: tuple[tuple[str, str], ...]
  evaluations: tuple[str, ...]
  seeds: Mapping[str, int]
  test: str = (
    f"two-sided t over seeds and items, {MIN_SEEDS} seeds or more of each arm; "
    "Holm 1979 over comparisons and main metrics, 0.05"
  )
  num_started_runs: int = 0

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> ComparisonFamily:
    """The inverse of `dataclasses.asdict`, through JSON."""
    pairs = tuple((str(arm), str(base)) for arm, base in fields["comparisons"])
    names = tuple(map(str, fields["evaluations"]))
    started = int(fields.get("num_started_runs", 0))  # Absent in older studies.
    seeds, test = dict(fields["seeds"]), str(fields["test"])
    return cls(pairs, names, seeds, test, started)

  @classmethod
  def of_runs(
    cls,
    runs: Sequence[StudyRun],
    comparisons: Sequence[tuple[str, str]] = (),
  ) -> ComparisonFamily:
    """Tests of the main metrics of all evaluations.

    By default, compares each arm `A+B` with its parts `A` and `B`; without such
    arms, each arm with the first.
    """
    seeds = collections.Counter(run.arm for run in runs)
    names = [*seeds]
    part_pairs = [
      (arm, part)
      for arm in names
      for part in arm.split("+")
      if part in names and part != arm
    ]
    evaluations = dict.fromkeys(
      n for run in runs for n in run.settings["evals"]
    )
    pairs = comparisons or part_pairs or [(arm, names[0]) for arm in names[1:]]
    return cls(tuple(pairs), tuple(evaluations), dict(seeds))


@dataclasses.dataclass(frozen=True)
class Study:
  """The runs of a study, stored as `study.json` in its folder."""

  kind: str
  config: str  # as in `--config`
  baseline: str  # the reference arm of comparisons
  match: str  # quantity equal in all runs: `images` or `flops`
  budget: float  # factor of the config's steps
  runs: tuple[StudyRun, ...]
  # FLOPs per image, by digest of the settings that determine them.
  costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
  counted_by: str = ""  # `code_version` that counted `costs`
  family: ComparisonFamily | None = None  # None in studies of older versions.
  notes: tuple[str, ...] = ()  # Skipped arms; not stored.

  @property
  def fingerprint(self) -> str:
    """Digest of the resolved settings of all runs."""
    return digest({run.name: run.settings for run in self.runs})

  def to_dict(self) -> dict[str, Any]:
    """Converts to JSON-serializable fields."""
    fields = {k: v for k, v in vars(self).items() if k != "notes"}
    runs = [{**vars(run), "overrides": [*run.overrides]} for run in self.runs]
    fields["family"] = self.family and dataclasses.asdict(self.family)
    head = {"format": FORMAT, "fingerprint": self.fingerprint}
    return {**head, **fields, "runs": runs}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> Study:
    """The inverse of `to_dict`."""
    runs = []
    for run in fields["runs"]:
      runs.append(StudyRun(**{**run, "overrides": tuple(run["overrides"])}))
    names = {f.name for f in dataclasses.fields(cls)} - {"notes"}
    values = {name: fields[name] for name in names & fields.keys()}
    if (family := fields.get("family")) is not None:
      values["family"] = ComparisonFamily.from_dict(family)
    return cls(**values | {"runs": tuple(runs)})


def digest(value: Any) -> str:
  """A short hash of JSON-serializable settings."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@functools.cache
def code_version() -> str:
  """The package's version and a digest of the code that determines FLOPs."""
  root = pathlib.Path(mtv_jax.__file__).parent
  code = hashlib.blake2b(digest_size=8)
  for package in ("augment", "models", "objectives", "perf", "train"):
    for file in sorted(root.glob(f"{package}/**/*.py")):
      code.update(file.read_bytes())
  return f"{mtv_jax.__version__}-{code.hexdigest()}"


def expand(
  kind: str,
  config: str,
  *,
  assignments: Sequence[str] = (),
  options: arms_lib.Options | None = None,
  seeds: str = "1",
  match: str = "images",
  budget: float = 1.0,
  family: str = "",
  cost_fn: CostFn | None = None,
  costs: Mapping[str, float] | None = None,
) -> Study:
  """Expands a config into the runs of a study.

  `assignments` override all runs. `family` lists tested comparisons as
  `ARM:BASELINE,...`; without it, the `family` of `options.arms`. `cost_fn`
  counts FLOPs per image, and `costs` are known counts (see `Study.costs`).
  Errors name the arm.
  """
  check_choice("--match", match, MATCHES)
  if not 0 < budget <= _MAX_BUDGET:
    raise ConfigError(
      f"--budget={budget}: expected a number above 0, at most {_MAX_BUDGET}."
    )
  base = overrides_lib.override(recipes.read_config(config), assignments)
  resolved = resolve(base)
  options = options or arms_lib.Options()
  arms, notes = arms_lib.make_arms(kind, resolved, options)
  names = [arm.name for arm in arms]
  family = family or arms_lib.read_family(options)
  counts, comparisons = _count_seeds(seeds, names), _read_family(family, names)
  length = lengths.read_length(resolved)
  steps = max(round(budget * length.total_steps), 1)
  expansion = _Expansion(
    base, assignments, resolved.total, length, steps, costs, cost_fn
  )
  if match == "flops":
    expansion.set_target()

  runs_by_arm = []
  for arm in arms:
    try:
      runs_by_arm.append(expansion.make_runs(arm, resolved.seed, counts))
    except UserError as error:
      error.add_note(f"(in the arm {arm.name!r})")
      raise
  # Order runs by seed, so that a study stopped early still compares all arms.
  rounds = itertools.zip_longest(*runs_by_arm)
  runs = tuple(run for row in rounds for run in row if run is not None)
  return Study(
    kind=kind,
    config=config,
    baseline=arms[0].name,
    match=match,
    budget=budget,
    runs=runs,
    family=ComparisonFamily.of_runs(runs, comparisons),
    costs=expansion.costs,
    counted_by=code_version(),
    notes=notes,
  )


class _Expansion:
  """Makes the runs of each arm, and counts their FLOPs.

  Args:
    base: the study's config, with `assignments` applied.
    total: its run length as written; `length` is the same in steps. Runs train
      for `steps`, unless FLOPs are matched.
    costs: known FLOPs per image, see `Study.costs`; new counts are added.
  """

  def __init__(self, base, assignments, total, length, steps, costs, cost_fn):
    self.base, self.assignments = base, assignments
    self.total, self.length, self.steps = total, length, steps
    self.costs, self._cost_fn = dict(costs or {}), cost_fn
    self._target = None  # FLOPs of a run, divided by its batch size

  def count_flops(self, settings: Mapping[str, Any]) -> float | None:
    """FLOPs per image, counted once; None if unknown."""
    counted = {k: v for k, v in settings.items() if k not in _NOT_COUNTED}
    objectives = settings["objectives"].items()
    counted["objectives"] = {name: {**o, "weight": 1} for name, o in objectives}
    key = digest(counted)
    if key not in self.costs and self._cost_fn is not None:
      self.costs[key] = self._cost_fn(settings)
    return self.costs.get(key)

  def set_target(self) -> None:
    """Matches every run to the FLOPs of the study's config."""
    if self._cost_fn is None:
      raise ConfigError("--match=flops needs a count of FLOPs.")
    self._target = self.steps * self.count_flops(_resolve(self.base, ()))

  def make_runs(
    self, arm: Arm, first_seed: int, counts: Mapping[str, int]
  ) -> list[StudyRun]:
    """Makes the runs of an arm, one per seed."""
    base, steps = self.base, self.steps
    changes = (*arm.overrides, *_adapt_arm(base, arm, self.length))
    if self._target is not None:
      per_image = self.count_flops(_resolve(base, changes))
      steps = max(round(self._target / per_image), 1)
    # Use the arm's config: setting a dropped objective would restore it.
    adapted = resolve(overrides_lib.override(base, changes))
    self._check_arm(adapted, first_seed)
    changes += tuple(lengths.set_length(adapted, self.length, steps))
    settings = _resolve(base, changes)
    per_image = self.count_flops(settings)
    flops = per_image and per_image * steps * settings["batch_size"]
    runs = []
    for i in range(counts[arm.name]):
      seed = first_seed + i
      assignments = (*self.assignments, *changes, *[f"seed={seed}"][: i > 0])
      run_settings, name = {**settings, "seed": seed}, f"{arm.name}-s{seed}"
      runs.append(
        StudyRun(name, arm.name, seed, assignments, steps, run_settings, flops)
      )
    return runs

  def _check_arm(self, adapted: RunConfig, first_seed: int) -> None:
    """Raises ConfigError if an arm sets the seed or the length of a run."""
    total, batch_size = adapted.total, self.length.batch_size
    is_same_batch = total.unit != "examples" or adapted.batch_size == batch_size
    if adapted.seed != first_seed:
      raise ConfigError("an arm can't set the seed: pass --seeds.")
    if total != self.total or not is_same_batch:
      raise ConfigError(
        "an arm can't set the length of its runs, which is the study's: change "
        f"it for all arms with --set=total_{total.unit}=..."
      )


def _count_seeds(text: str, arms: Sequence[str]) -> dict[str, int]:
  """Seeds by arm, from `N` or `ARM:N,...,N`."""
  counts: dict[str, int] = {}
  for part in text.split(","):
    name, colon, number = part.strip().rpartition(":")
    if not number.isdecimal() or not int(number):
      raise ConfigError(
        f"--seeds={text}: {number!r} is not a number of seeds; write 3, or"
        " ARM:5,3 for five seeds of an arm and three of the others."
      )
    if colon and name not in arms:
      raise ConfigError(
        f"--seeds={text}: {name!r} is not an arm. {did_you_mean(name, arms)}"
      )
    if name in counts:
      target = repr(name) if colon else "the other arms"
      raise ConfigError(f"--seeds={text} has two numbers for {target}.")
    counts[name] = int(number)
  return {arm: counts.get(arm, counts.get("", 1)) for arm in arms}


def _read_family(text: str, arms: Sequence[str]) -> list[tuple[str, str]]:
  """Pairs of arms from `ARM:BASELINE,...`."""
  pairs = [p.strip().partition(":")[::2] for p in text.split(",") if p.strip()]
  for arm, baseline in pairs:
    if {arm, baseline} - {*arms} or arm == baseline:
      raise ConfigError(
        f"family {text}: {arm}:{baseline} is not ARM:BASELINE of two arms of "
        f"{', '.join(arms)}."
      )
  return pairs


def _adapt_arm(base: ConfigDict, arm: Arm, length: RunLength) -> list[str]:
  """Overrides that drop settings an arm can't use, and enable image sheets."""
  without_rules = ("optim.rules=None", "sharding=None")
  changes = (*arm.overrides, *without_rules)
  config = resolve(overrides_lib.override(base, changes))
  spec = build_all_objectives_spec(config)
  params = abstract_params(spec)
  # Detects invalid options before the study is recorded.
  make_optimizer(
    config.parts.update_rule,
    config.optim,
    config.schedule,
    length=length,
    params=params,
    table=match_param_rules(params, (), length=length),
  )
  heads = build_prediction_heads(config, spec.model)
  capabilities = evaluable(spec.model, heads)
  changes = []
  for name, evaluator in build_evaluators(config.evals).items():
    entry = config.evals[name]
    if not evaluator.requires <= capabilities:
      changes.append(f"evals.{name}=None")
      continue
    if hasattr(evaluator, "pictures") and "pictures" not in entry.options:
      changes.append(f"evals.{name}.pictures={SHEET_IMAGES}")
    if entry.weights == "teacher" and not spec.has_teacher:
      changes.append(f"evals.{name}.weights=student")
  if config.weights == "teacher" and not spec.has_teacher:
    changes.append("weights=student")
  names = [name for name, _ in flatten_with_names(params)]
  for key, rules in (
    ("optim.rules", base.optim.get("rules")),
    ("sharding", base.get("sharding")),
  ):
    if rules:
      used_rules = [r for r in rules if _is_used(r, names)]
      if len(used_rules) < len(rules):
        changes.append(f"{key}={sections.to_dict(used_rules)}")
  return changes


def _is_used(rule: Any, names: Sequence[str]) -> bool:
  """Whether a rule matches a parameter; true if a run will reject it."""
  try:
    return bool(select_names(names, [rule[0]]))
  except (TypeError, LookupError, InputError):
    return True


def _resolve(base: ConfigDict, changes: Sequence[str]) -> dict[str, Any]:
  """Resolves and checks the config, as a run writes it to `config.json`."""
  config = resolve(overrides_lib.override(base, changes))
  build_all_objectives_spec(config)
  return config.to_dict()
