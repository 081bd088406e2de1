"""Arms of each kind of study.

Objectives are grouped as in Figure 1 of the paper (arXiv 2601.13886):
image-text (VL), self-supervision (SSL), grounding, depth. Each further
objective type is its own group.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from mtv_jax.config.options import check_value
from mtv_jax.data import registry
from mtv_jax.models import two_tower
from mtv_jax.objectives import REGISTRY, objective_class
from mtv_jax.train.balance import METHODS
from mtv_jax.train.config import RunConfig, WeightConfig
from mtv_jax.utils import path as paths
from mtv_jax.utils.errors import ConfigError, InputError, did_you_mean

# Groups of objectives (`Objective.group`), in the order of the paper's ladder.
GROUPS = ("vl", "ssl", "grounding", "depth")
FIXED = "fixed"  # The arm with the config's weights, without balancing.
_FAMILY = "family"  # Not an arm: the comparisons of a file of arms.


@dataclasses.dataclass(frozen=True)
class Arm:
  """A setting of a study: a name and config overrides."""

  name: str
  overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of the kinds of studies.

  Attributes:
    groups: objective groups in ladder order; all by default.
    models: for `scaling`: each a variant of both towers, or
      `NAME:KEY=VALUE,...` with keys of `config.model`; the config's by default.
    images: for `scaling`: numbers of distinct images; the config's by default.
    methods: for `balance`: balancing methods; all by default.
    weights: for `balance`: each `NAME:OBJECTIVE=WEIGHT,...`.
    arms: for `custom`: a JSON file of overrides by arm, `{NAME: [OVERRIDE]}`,
      the baseline first; its key `family`, if present, lists the tested
      comparisons as `ARM:BASELINE`.
  """

  groups: tuple[str, ...] = ()
  models: tuple[str, ...] = ()
  images: tuple[int, ...] = ()
  methods: tuple[str, ...] = ()
  weights: tuple[str, ...] = ()
  arms: str = ""


def make_arms(
  kind: str, config: RunConfig, options: Options
) -> tuple[list[Arm], tuple[str, ...]]:
  """Builds and checks the arms of a study of a resolved config.

  The first arm is the baseline. Also returns notes on skipped arms.
  """
  if kind not in KINDS:
    raise ConfigError(f"study {kind!r}: {did_you_mean(kind, KINDS)}")
  make, option_names = KINDS[kind]
  for field in dataclasses.fields(options):
    if getattr(options, field.name) and field.name not in option_names:
      kinds = [k for k, (_, names) in KINDS.items() if field.name in names]
      raise ConfigError(
        f"--{field.name} is an option of {', '.join(kinds)}, not of {kind}."
      )
  arms, notes = make(config, options), ()
  if "groups" in option_names and not options.groups:
    groups = group_objectives(config)
    notes = tuple(
      f"The config has no objective of the group {group!r}"
      f" ({', '.join(k for k in REGISTRY if _group_of(k) == group)}): its arms"
      " are skipped."
      for group in GROUPS
      if group not in groups
    )
  names = [arm.name for arm in arms]
  if len(names) < 2:
    raise ConfigError(
      f"this config has only the arms {names} of a {kind}: nothing to compare. "
      f"{' '.join(notes)}".strip()
    )
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f"two arms have the name {name!r}.")
    # Names become folder names, and --seeds separates them by commas.
    if not re.fullmatch(r"\w[\w.+ -]*", name):
      raise ConfigError(
        f"an arm has the name {name!r}; expected letters, digits and any of"
        " '_.+- ', starting with a letter or digit."
      )
  return arms, notes


def _group_of(kind: str, *, where: str = "") -> str:
  cls = objective_class(kind, where=where)
  return cls.group or kind.rpartition(":")[2]


def group_objectives(
  config: RunConfig, order: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
  """Names of the config's objectives by group."""
  groups: dict[str, tuple[str, ...]] = dict.fromkeys(GROUPS, ())
  for name, entry in config.objectives.items():
    group = _group_of(entry.type, where=f"config.objectives.{name}")
    groups[group] = (*groups.get(group, ()), name)
  groups = {group: names for group, names in groups.items() if names}
  if not groups:
    raise ConfigError("this config has no objectives to compare.")
  for group in order:
    if order.count(group) > 1:
      raise ConfigError(f"--groups has {group!r} twice.")
    if group not in groups:
      raise ConfigError(
        f"--groups={group}: this config has no such objectives. "
        f"{did_you_mean(group, groups)}"
      )
  return {group: groups[group] for group in order or groups}


def _keep_groups(
  config: RunConfig, options: Options, select: Callable[[list[str]], Any]
) -> list[Arm]:
  """Makes arms that train some groups; `select` maps all groups to arms."""
  groups, arms = group_objectives(config, options.groups), []
  for name, selected in select(list(groups)).items():
    included = {objective for group in selected for objective in groups[group]}
    dropped = [n for n in config.objectives if n not in included]
    arms.append(Arm(name, tuple(f"objectives.{n}=None" for n in dropped)))
  return arms


def _ladder(groups: list[str]) -> dict[str, list[str]]:
  """Each arm adds one group and has its name."""
  return {name: groups[: i + 1] for i, name in enumerate(groups)}


def _leave_one_out(groups: list[str]) -> dict[str, list[str]]:
  """All groups, then all groups but one."""
  arms = {f"without_{g}": [n for n in groups if n != g] for g in groups}
  return {"all": groups} | (arms if len(groups) > 1 else {})


def _pairs(groups: list[str]) -> dict[str, tuple[str, ...]]:
  """Each group alone, then each pair of groups."""
  sets = [*((name,) for name in groups), *itertools.combinations(groups, 2)]
  return {"+".join(names): names for names in sets}


def _make_scaling_arms(config: RunConfig, options: Options) -> list[Arm]:
  """The product of models and numbers of images."""
  variants = [text for text in options.models if ":" not in text]
  # If all patch sizes are equal, the name of a model omits them.
  is_one_patch = len({text.partition("/")[2] for text in variants}) < 2
  models = [_scale_model(config, text, is_one_patch) for text in options.models]
  models = models or [Arm(config.model.variant.partition("/")[0])]
  available = count_records(config, limited=False) if options.images else []
  sizes = [_limit_images(config, count, available) for count in options.images]
  return [
    Arm(f"{model.name}-{size.name}", (*model.overrides, *size.overrides))
    for model, size in itertools.product(models, sizes or [Arm("all")])
  ]


def _scale_model(config: RunConfig, text: str, is_one_patch: bool) -> Arm:
  """An arm from `VARIANT` or `NAME:KEY=VALUE,...`."""
  name, colon, settings = text.partition(":")
  if colon:
    parts = settings.split(",")
    if not all("=" in part for part in parts):
      raise ConfigError(f"--models={text}: write NAME:KEY=VALUE,KEY=VALUE.")
    return Arm(name, tuple(f"model.{part}" for part in parts))
  shape = {"width", "depth", "heads", "mlp_dim"}
  for path, section in (
    ("model", config.model),
    ("model.text", config.model.text),
  ):
    if section is not None and (set_shape := shape & {*section.options}):
      raise ConfigError(
        f"--models={text}: config.{path} sets {', '.join(sorted(set_shape))}"
        " itself, which a variant would not change. Write"
        " --models=NAME:width=...,..."
      )
  two_tower.variant(text)
  changes = [f"model.variant={text}"]
  if config.model.text is not None:
    changes.append(f"model.text.variant={text.partition('/')[0]}")
  shape, _, patch = text.partition("/")
  return Arm(shape if is_one_patch else f"{shape}_{patch}", tuple(changes))


def count_records(config: RunConfig, *, limited: bool = True) -> list[int]:
  """Counts the records of each source, up to its `limit` if `limited`."""
  kept_keys = {"limit"} if limited else set()
  removed = {k: None for k in registry.WHOLE if k not in kept_keys}
  entries = config.data.train
  return [len(registry.build_source({**entry, **removed})) for entry in entries]


def _limit_images(
  config: RunConfig, count: int, available: Sequence[int]
) -> Arm:
  """An arm with `count` distinct images, split over sources by weight."""
  if count < 1:
    raise ConfigError(f"--images={count}: expected a positive number.")
  weights = [entry.get("weight", 1.0) for entry in config.data.train]
  changes = []
  for i, weight in enumerate(weights):
    limit = max(round(count * weight / sum(weights)), 1)
    if limit > available[i]:
      raise ConfigError(
        f"--images={count}: data.train[{i}] has {available[i]:,} records, fewer"
        f" than its share of {limit:,}. Use fewer images."
      )
    changes.append(f"data.train[{i}].limit={limit}")
  return Arm(str(count), tuple(changes))


def balance_methods() -> tuple[str, ...]:
  """Names of the methods of `config.balance`, without fixed weights."""
  return tuple(method for method in METHODS if method != FIXED)


def _make_balance_arms(config: RunConfig, options: Options) -> list[Arm]:
  """The config's weights, alternative weights, and balancing methods."""
  names, section = balance_methods(), config.balance
  for method in options.methods:
    if method not in names:
      raise ConfigError(f"--methods={method}: {did_you_mean(method, names)}")
  fixed = ("balance=None",) if section is not None else ()
  arms = [Arm(FIXED, fixed)]
  arms += [_set_weights(config, text, fixed) for text in options.weights]
  for method in options.methods or names:
    # The config's own method keeps its options; other methods use defaults.
    is_configured = section is not None and section.method == method
    override = f'balance=dict(method="{method}")'
    arms.append(Arm(method, () if is_configured else (override,)))
  return arms


def _set_weights(config: RunConfig, text: str, fixed: tuple[str, ...]) -> Arm:
  name, colon, rest = text.partition(":")
  if not colon:
    raise ConfigError(
      f"--weights={text}: write NAME:OBJECTIVE=WEIGHT,OBJECTIVE=WEIGHT."
    )
  changes = []
  for part in rest.split(","):
    objective, equals, weight = part.partition("=")
    if objective not in config.objectives or not equals:
      raise ConfigError(
        f"--weights={text}: {part!r} is not OBJECTIVE=WEIGHT. "
        f"{did_you_mean(objective, config.objectives)}"
      )
    is_scheduled = isinstance(config.objectives[objective].weight, WeightConfig)
    key = "weight.value" if is_scheduled else "weight"
    changes.append(f"objectives.{objective}.{key}={weight}")
  return Arm(name, (*fixed, *changes))


def _make_teacher_arms(config: RunConfig, options: Options) -> list[Arm]:
  """Each teacher with a `path` alone, then all of them."""
  del options
  names = [n for n, t in config.teachers.items() if t.path is not None]
  arms = [
    Arm(name, tuple(f"teachers.{n}=None" for n in names if n != name))
    for name in names
  ]
  return [*arms, *[Arm("+".join(names))] * (len(names) > 1)]


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  names = [name for name, _ in pairs]
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f"two arms have the name {name!r}.")
  return dict(pairs)


def _read_custom_arms(config: RunConfig, options: Options) -> list[Arm]:
  """Reads the arms of the file `options.arms`."""
  del config
  if not options.arms:
    raise ConfigError("study custom needs --arms=FILE.json.")
  entries = _read_plan(options.arms)
  entries.pop(_FAMILY, None)
  return [Arm(name, tuple(changes)) for name, changes in entries.items()]


def read_family(options: Options) -> str:
  """Tested comparisons of the file `options.arms`, as `--family` has them."""
  plan = _read_plan(options.arms) if options.arms else {}
  return ",".join(plan.get(_FAMILY, ()))


def _read_plan(path: str) -> dict[str, list[str]]:
  try:
    entries = json.loads(
      paths.read_bytes(pathlib.Path(path)),
      object_pairs_hook=_reject_duplicates,
    )
  except FileNotFoundError:
    raise InputError(f"--arms={path}: no such file.") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"--arms={path} is not JSON: {error}.") from None
  try:
    check_value(entries, dict[str, list[str]], path)
  except ConfigError as error:
    raise InputError(f"{error} Write {{NAME: [OVERRIDE, ...], ...}}.") from None
  return entries


# By name: the function, and the fields of `Options` that it reads.
KINDS: dict[str, tuple[Callable[[RunConfig, Options], list[Arm]], Any]] = {
  "ladder": (functools.partial(_keep_groups, select=_ladder), ("groups",)),
  "leave_one_out": (
    functools.partial(_keep_groups, select=_leave_one_out),
    ("groups",),
  ),
  "pairs": (functools.partial(_keep_groups, select=_pairs), ("groups",)),
  "scaling": (_make_scaling_arms, ("models", "images")),
  "balance": (_make_balance_arms, ("methods", "weights")),
  "teachers": (_make_teacher_arms, ()),
  "custom": (_read_custom_arms, ("arms",)),
}
