"""Arms of each kind of study.

Objectives are grouped as in Figure 1 of the paper (arXiv 2601.13886):
image-text (VL), self-supervision (SSL), grounding, depth. Each further
objective type is its own group.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from mtv_jax.config import aliases
from mtv_jax.data import registry
from mtv_jax.models import two_tower
from mtv_jax.train.balance import METHODS
from mtv_jax.train.run import RunConfig, WeightConfig
from mtv_jax.utils.errors import ConfigError, did_you_mean

# Objective types by group, in the order of the paper's ladder.
GROUPS = {
  "vl": ("contrastive", "captioning"),
  "ssl": ("dino", "ibot", "mae", "gram"),
  "grounding": ("grounding",),
  "depth": ("depth",),
}
FIXED = "fixed"  # The arm with the config's weights, without balancing.


@dataclasses.dataclass(frozen=True)
class Arm:
  """A setting of a study: a name and config overrides."""

  name: str
  overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Arms:
  """The arms of a study."""

  arms: list[Arm]
  baseline: str
  notes: tuple[str, ...] = ()  # Skipped arms, with reasons.


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
  """

  groups: tuple[str, ...] = ()
  models: tuple[str, ...] = ()
  images: tuple[int, ...] = ()
  methods: tuple[str, ...] = ()
  weights: tuple[str, ...] = ()


def make_arms(kind: str, config: RunConfig, options: Options) -> Arms:
  """Builds and checks the arms of a study of a resolved config."""
  if kind not in KINDS:
    raise ConfigError(f"study {kind!r}: {did_you_mean(kind, KINDS)}")
  make, taken = KINDS[kind]
  for field in dataclasses.fields(options):
    if getattr(options, field.name) and field.name not in taken:
      kinds = [k for k, (_, names) in KINDS.items() if field.name in names]
      raise ConfigError(
        f"--{field.name} is an option of {', '.join(kinds)}, not of {kind}."
      )
  arms = make(config, options)
  names = [arm.name for arm in arms.arms]
  if len(names) < 2:
    reasons = " ".join(arms.notes)
    raise ConfigError(
      f"this config gives the one arm {names} of a {kind}: nothing to compare. "
      f"{reasons}".strip()
    )
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f"two arms have the name {name!r}.")
    # Names become folder names, and --seeds separates them by commas.
    if not re.fullmatch(r"\w[\w.+ -]*", name):
      raise ConfigError(
        f"an arm has the name {name!r}; expected letters, digits and any of"
        " '_.+- ', a letter or digit first."
      )
  return arms


def group_objectives(
  config: RunConfig, order: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
  """Names of the config's objectives by group."""
  groups: dict[str, tuple[str, ...]] = dict.fromkeys(GROUPS, ())
  group_of = {kind: name for name, kinds in GROUPS.items() for kind in kinds}
  for name, entry in config.objectives.items():
    group = group_of.get(entry.type, entry.type)
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


def _lacking(groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
  return tuple(
    f"The config has no objective of the group {group!r}"
    f" ({', '.join(kinds)}): its arms are left out."
    for group, kinds in GROUPS.items()
    if group not in groups
  )


def _keep_groups(
  name: str, config: RunConfig, groups: Mapping[str, Sequence[str]]
) -> Arm:
  """An arm that trains only the objectives of some groups."""
  kept = {objective for names in groups.values() for objective in names}
  dropped = [n for n in config.objectives if n not in kept]
  return Arm(name, tuple(f"objectives.{n}=None" for n in dropped))


def _ladder(config: RunConfig, options: Options) -> Arms:
  """Each arm adds a group, which names it."""
  groups = group_objectives(config, options.groups)
  arms, trained = [], {}
  for name, objectives in groups.items():
    trained[name] = objectives
    arms.append(_keep_groups(name, config, trained))
  notes = () if options.groups else _lacking(groups)
  return Arms(arms, next(iter(groups)), notes)


def _leave_one_out(config: RunConfig, options: Options) -> Arms:
  """All groups, then all groups but one."""
  groups = group_objectives(config, options.groups)
  arms = [_keep_groups("all", config, groups)]
  for left_out in groups:
    rest = {name: names for name, names in groups.items() if name != left_out}
    if rest:
      arms.append(_keep_groups(f"without_{left_out}", config, rest))
  notes = () if options.groups else _lacking(groups)
  return Arms(arms, "all", notes)


def _pairs(config: RunConfig, options: Options) -> Arms:
  """Each group alone, then each pair of groups."""
  groups = group_objectives(config, options.groups)
  sets = [(name,) for name in groups]
  sets += itertools.combinations(groups, 2)
  arms = [
    _keep_groups(
      "+".join(names), config, {name: groups[name] for name in names}
    )
    for names in sets
  ]
  notes = () if options.groups else _lacking(groups)
  return Arms(arms, next(iter(groups)), notes)


def _scaling(config: RunConfig, options: Options) -> Arms:
  """The product of models and numbers of images."""
  variants = [text for text in options.models if ":" not in text]
  # If the patch sizes are equal, the shape names the model.
  one_patch = len({text.partition("/")[2] for text in variants}) < 2
  models = [_scale_model(config, text, one_patch) for text in options.models]
  models = models or [Arm(config.model.variant.partition("/")[0])]
  available = count_records(config, limited=False) if options.images else []
  sizes = [_limit_images(config, count, available) for count in options.images]
  sizes = sizes or [Arm("all")]
  arms = [
    Arm(f"{model.name}-{size.name}", (*model.overrides, *size.overrides))
    for model, size in itertools.product(models, sizes)
  ]
  return Arms(arms, arms[0].name)


def _scale_model(config: RunConfig, text: str, one_patch: bool) -> Arm:
  """An arm from `VARIANT` or `NAME:KEY=VALUE,...`."""
  name, colon, rest = text.partition(":")
  if colon:
    parts = rest.split(",")
    if not all("=" in part for part in parts):
      raise ConfigError(f"--models={text}: write NAME:KEY=VALUE,KEY=VALUE.")
    return Arm(name, tuple(f"model.{part}" for part in parts))
  shape = {"width", "depth", "heads", "mlp_dim"}
  for path, section in (
    ("model", config.model),
    ("model.text", config.model.text),
  ):
    if section is not None and (own := shape & {*section.options}):
      raise ConfigError(
        f"--models={text}: config.{path} sets {', '.join(sorted(own))} itself,"
        " which a variant would not change. Write --models=NAME:width=...,..."
      )
  two_tower.variant(text)
  changes = [f"model.variant={text}"]
  if config.model.text is not None:
    changes.append(f"model.text.variant={text.partition('/')[0]}")
  shape, _, patch = text.partition("/")
  return Arm(shape if one_patch else f"{shape}_{patch}", tuple(changes))


def count_records(config: RunConfig, *, limited: bool = True) -> list[int]:
  """Counts the records of each source, up to its `limit` if `limited`."""
  without = {"labels": None} if limited else {"labels": None, "limit": None}
  entries = config.data.train
  return [len(registry.build_source({**e, **without})) for e in entries]


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
        f" than its share of {limit:,}. Take fewer images."
      )
    changes.append(f"data.train[{i}].limit={limit}")
  return Arm(str(count), tuple(changes))


def balance_methods() -> tuple[str, ...]:
  """Methods of `config.balance`, without fixed weights."""
  return tuple(method for method in METHODS if method != FIXED)


def _balance(config: RunConfig, options: Options) -> Arms:
  """The config's weights, alternative weights, and balancing methods."""
  known, section = balance_methods(), config.balance
  for method in options.methods:
    if method not in known:
      raise ConfigError(f"--methods={method}: {did_you_mean(method, known)}")
  fixed = ("balance=None",) if section is not None else ()
  arms = [Arm(FIXED, fixed)]
  arms += [_set_weights(config, text, fixed) for text in options.weights]
  for method in options.methods or known:
    # The config's own method keeps its options; other methods use defaults.
    is_own = section is not None and section.method == method
    new = f'balance=dict(method="{method}")'
    arms.append(Arm(method, () if is_own else (new,)))
  return Arms(arms, FIXED)


def _set_weights(config: RunConfig, text: str, fixed: tuple[str, ...]) -> Arm:
  name, colon, rest = text.partition(":")
  if not colon:
    raise ConfigError(
      f"--weights={text}: write NAME:OBJECTIVE=WEIGHT,OBJECTIVE=WEIGHT."
    )
  changes = []
  for part in rest.split(","):
    objective, equals, weight = part.partition("=")
    objective = aliases.new_name(objective)
    if objective not in config.objectives or not equals:
      raise ConfigError(
        f"--weights={text}: {part!r} is not OBJECTIVE=WEIGHT. "
        f"{did_you_mean(objective, config.objectives)}"
      )
    scheduled = isinstance(config.objectives[objective].weight, WeightConfig)
    key = "weight.value" if scheduled else "weight"
    changes.append(f"objectives.{objective}.{key}={weight}")
  return Arm(name, (*fixed, *changes))


def _teachers(config: RunConfig, options: Options) -> Arms:
  """Each teacher with a `path` alone, then all of them."""
  del options
  names = [n for n, t in config.teachers.items() if t.path is not None]
  arms = [
    Arm(name, tuple(f"teachers.{n}=None" for n in names if n != name))
    for name in names
  ]
  if len(names) > 1:
    arms.append(Arm("+".join(names)))
  return Arms(arms, names[0] if names else "")


# By name: the function, and the fields of `Options` that it reads.
KINDS: dict[str, tuple[Callable[[RunConfig, Options], Arms], tuple[str, ...]]]
KINDS = {
  "ladder": (_ladder, ("groups",)),
  "leave_one_out": (_leave_one_out, ("groups",)),
  "pairs": (_pairs, ("groups",)),
  "scaling": (_scaling, ("models", "images")),
  "balance": (_balance, ("methods", "weights")),
  "teachers": (_teachers, ()),
}
