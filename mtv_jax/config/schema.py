"""The config schema, durations, and recipes with typed arguments.

Nothing here imports JAX, as data workers and command lines need it.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from mtv_jax import configs
from mtv_jax.config import aliases, options, overrides
from mtv_jax.config.options import (
  Fraction,
  NonNegativeFloat,
  NonNegativeInt,
  Pool,
  PositiveFloat,
  PositiveInt,
  Range,
)
from mtv_jax.utils.errors import ConfigError, did_you_mean

UNITS = ("steps", "epochs", "examples", "percent")
REQUIRED = object()
Config = ConfigDict | Mapping[str, Any]

# ---------------------------------------------------------------------------
# The schema.

# Kinds of keys: an annotation, or a dictionary for a section, is a required
# key; a pair (kind, default) an optional one. Sections without a pair default
# to their defaults. None counts as absent.


class Open(dict):
  """A section with further options, which `config.options` checks."""


class Entries(dict):
  """Named open sections {NAME: section}; `type` defaults to the name."""


class ClosedEntries(Entries):
  """Named sections without further options."""


class Scheduled(dict):
  """A section that may be given as its `value` alone."""


@dataclasses.dataclass(frozen=True)
class Duration:
  """One of NAME_steps, NAME_epochs, NAME_examples and NAME_percent."""

  default: Any  # In steps; None if there is no default.
  number: Any = NonNegativeFloat  # Annotation of the value.
  units: tuple[str, ...] = UNITS


List = list | tuple  # JSON has only lists.
_MESH = dict(data=(int, -1), fsdp=(int, 1), tensor=(int, 1))

SCHEMA = dict(
  seed=(Annotated[int, Range(0, 2**32 - 1)], 0),  # JAX drops higher bits.
  batch_size=PositiveInt,  # Examples per step, over all hosts.
  total=Duration(REQUIRED, PositiveFloat, UNITS[:3]),
  data=dict(
    # Sources: dict(type, weight=1.0, and what the source takes).
    train=List,
    ops=str,  # Host ops: "decode|canvas(224)|caption(64)".
    workers=(int, 0),  # Reader processes; 0 reads by threads of this process.
    threads=(int, None),
    prefetch=(int, None),
    max_corrupt=(Fraction, 0.01),  # Share of unusable records to stop at.
    shuffle=(Literal["global", "block", "none"], "global"),
  ),
  views=Entries(count=(int, 1), ops=str | list | tuple),
  model=Open(
    variant=(str, "B/16"),
    image_size=(int, 224),  # Resolution of the stored position embedding.
    pool=(Pool, "map"),
    dtype=(Literal["bfloat16", "float32"], "bfloat16"),
    remat=(str, "none"),
    scan=(bool, True),
    # See `models/attention.py`.
    attention=(Literal["auto", "xla", "cudnn", "splash"], "auto"),
    quantization=(Literal["none", "int8", "fp8"], "none"),
    init=(str, "big_vision"),  # See `models/init.py`.
    # Of the channels in 0..1, or one number for all three.
    image_mean=(float | tuple[float, float, float], 0.5),
    image_std=(float | tuple[float, float, float], 0.5),
    # Of the image tower in training: see `stack.drop_path_scales`.
    drop_path=(Annotated[float, Range(min=0, below=1)], 0.0),
    drop_path_uniform=(bool, True),
    text=(
      Open(
        variant=(str, "B"),
        length=(int, 64),
        vocab_size=(int, 32_000),
        # Or a path: *.model, *.json. "" has to be set for training.
        tokenizer=(str, "bytes"),
        clean=(Literal["lower", "none", "canonicalize"], "lower"),
      ),
      None,
    ),
  ),
  accumulate=(PositiveInt, 1),  # Parts of a batch, encoded one after the other.
  objectives=Entries(
    type=str,
    # 0 until `start`; then rises to `value` over `ramp`.
    weight=(
      Scheduled(
        value=(NonNegativeFloat, 1.0), start=Duration(None), ramp=Duration(None)
      ),
      1.0,
    ),
  ),
  # Includes the method's options, see `train/balance/`. None: fixed weights.
  balance=(
    Open(
      method=(str, "grad_norm_mean"),
      # Between measurements of gradient norms, of methods that take them.
      every=Duration(None, PositiveFloat),
    ),
    None,
  ),
  # How the objectives' gradients on the encoder agree, see
  # `train/interference.py`.
  interference=(
    dict(every=Duration(100, PositiveFloat), transfer=(bool, True)),
    None,
  ),
  # Includes the optimizer's options, see `train/optim/transforms.py`.
  optim=Open(
    name=(str, "adamw"),
    lr=NonNegativeFloat,
    # Where given, lr is the rate at so many examples per step, and is scaled to
    # `batch_size`.
    lr_per_examples=(PositiveInt, None),
    lr_scaling=(Literal["linear", "sqrt"], "linear"),
    weight_decay=(NonNegativeFloat, 0.0),  # Times the rate, as in optax.
    weight_decay_end=(NonNegativeFloat, None),  # Of a cosine; None: constant.
    eps=(float, 1e-8),
    mu_dtype=(Literal["float32", "bfloat16"], "float32"),
    clip_norm=(NonNegativeFloat, 1.0),  # 0 for no clipping.
    # The norm of all gradients, or of each tower and each head by itself.
    clip_by=(Literal["global", "module"], "global"),
    rules=(List, ()),  # (regex, dict(lr=multiplier, weight_decay=multiplier)).
  ),
  # Includes the schedule's options, see `train/optim/schedules.py`.
  schedule=Open(
    name=(str, "cosine"),
    warmup=Duration(0),
    cooldown=Duration(0),
    timescale=Duration(10_000),  # Of rsqrt.
    end=(Fraction, 0.0),  # Of cosine, as a share of the peak rate.
    end_lr=(NonNegativeFloat, None),  # Or as a rate, at any batch size.
  ),
  ema=(dict(decay=(Fraction, 0.9999)), None),
  # Constant as in SILC, where a rising momentum hurts the text tower; `end`
  # gives DINOv2's cosine.
  teacher=dict(
    momentum=(Fraction, 0.996),
    end=(Fraction, None),
    # heads: the teacher's encoder is the student's of the same step (TIPSv2).
    ema=(Literal["all", "heads"], "all"),
  ),
  # Frozen image encoders that objectives read by name: of a path, or a copy of
  # the EMA teacher, refreshed as `train.step_spec.FrozenTeacher` says.
  teachers=ClosedEntries(
    path=(str, None),
    step=(int, None),
    # None: those that the run's `weights` names.
    weights=(Literal["student", "teacher", "ema"], None),
    update_every=Duration(None),
    max_updates=(PositiveInt, None),
    # Pixels per side that the teacher sees. None: those of the view, or in
    # `feature_distillation` its own.
    size=(PositiveInt, None),
    # Blocks whose patch tokens `feature_distillation` learns, -1 for the last.
    # None: the final ones, after the norm.
    layers=(tuple[int, ...], None),
    # Its features are read from label sets of this format, and it is not run.
    cached=(Literal["float8", "int8"], None),
    # Filled in from the path. None: the student's.
    model=(Open(), None),
    image_mean=(float | tuple[float, float, float], None),
    image_std=(float | tuple[float, float, float], None),
    # Pixels per side of its preprocessing. None: those of its model.
    input_size=(PositiveInt, None),
  ),
  # What evaluation and export take unless told otherwise; self-distillation on
  # images alone publishes the teacher.
  weights=(Literal["student", "teacher", "ema"], "student"),
  # dcn: how many parts of an axis lie on different slices, see `make_mesh`.
  mesh=dict(**_MESH, dcn=_MESH),
  sharding=(List, ()),  # (regex, axis or axes of each trailing dimension).
  init=(
    dict(
      path=str,
      step=(int, None),
      weights=(Literal["student", "teacher", "ema"], "student"),
      # Whether the EMA teacher starts as the source run's, and not as a copy of
      # the student.
      teacher=(bool, False),
      # Whether heads that the source lacks, or has in another shape, start at
      # random values; else they are an error.
      grow_heads=(bool, False),
      # Whether the text tower may get another tokenizer than the source's.
      new_tokenizer=(bool, False),
      include=(List, None),
      rename=(List, ()),
      min_coverage=(Fraction, 0.99),
    ),
    None,
  ),
  evals=Entries(type=str, every=Duration(None)),
  checkpoint=dict(
    every=Duration(1000, PositiveFloat),
    keep=(PositiveInt, 2),
    keep_every=(NonNegativeInt, None),
    # How often a save that failed is tried again before the run ends.
    retries=(NonNegativeInt, 5),
  ),
  log=dict(
    every=Duration(50, PositiveFloat),
    # How often each objective's gradient norm is measured.
    gradients=Duration(None),
    # A gradient norm of so many times the usual one is logged with them; 0:
    # none.
    spikes=(NonNegativeFloat, 10.0),
    # Op strings, see `train/metrics/trackers.py`.
    trackers=(str | tuple[str, ...], ("jsonl", "tensorboard")),
    # The first and the last step of a profile, both included.
    profile_steps=(tuple[PositiveInt, PositiveInt], None),
  ),
  # Updates that are not finite are skipped. After more than max_consecutive the
  # run returns to the checkpoint before them, and leaves out their rows.
  nonfinite=dict(
    max_consecutive=(NonNegativeInt, 10),
    then=(Literal["rollback", "stop"], "rollback"),
    max_rollbacks=(NonNegativeInt, 3),
  ),
  # A step that takes `factor` times the median, and min_seconds, ends the run,
  # as a process that does not answer for peer_seconds. 0: none does.
  watchdog=dict(
    factor=(NonNegativeFloat, 20.0),
    min_seconds=(PositiveFloat, 300.0),
    grace_seconds=(PositiveFloat, 60.0),
    peer_seconds=(NonNegativeFloat, 60.0),
  ),
)


def check_config(config: Config) -> ConfigDict:
  """Checks a config and fills in the defaults.

  Returns:
    A new config with every key of `SCHEMA`; checking it again changes nothing.

  Raises:
    ConfigError: an unknown or missing key, or a value of another type or out
      of range; names the full key.
  """
  config = aliases.rename_old_keys(overrides.to_plain(config))
  resolved = _section("config", SCHEMA, config)
  pixel_statistics(resolved["model"])
  train = resolved["data"]["train"]
  for i, source in enumerate(train):
    if not isinstance(source, Mapping) or "type" not in source:
      raise ConfigError(
        f"config.data.train[{i}] is {source!r}, expected a dictionary with a"
        " type."
      )
  if not train:
    raise ConfigError("config.data.train is empty: no data to train on.")
  for name in resolved["evals"]:
    if "/" in name:
      raise ConfigError(
        f"config.evals has an entry {name!r}: its results are written to files"
        " of that name, which can't have a '/'."
      )
  first, last = resolved["log"]["profile_steps"] or (1, 1)
  if last < first:
    raise ConfigError(
      f"config.log.profile_steps is ({first}, {last}), expected the first and"
      " the last step of a profile."
    )
  return ConfigDict(resolved)


def pixel_statistics(
  model: Config,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel, of a config's `model`.

  Raises:
    ConfigError: values that can't be those of channels in 0..1.
  """
  both = []
  for name, least in (("image_mean", 0.0), ("image_std", 1e-3)):
    value = model.get(name, 0.5)
    channels = tuple(value) if isinstance(value, List) else (value,) * 3
    if not all(least <= x <= 1 for x in channels):
      raise ConfigError(
        f"config.model.{name} is {value}, expected values of pixels in 0..1, "
        f"at least {least}: divide those of pixels in 0..255 by 255."
      )
    both.append(tuple(map(float, channels)))
  return both[0], both[1]


def _section(path: str, keys: Mapping[str, Any], entry: Any) -> dict[str, Any]:
  if not isinstance(entry, Mapping):
    raise ConfigError(f"{path} is {entry!r}, expected a section (a dict).")
  out, units = {}, []
  for name, kind in keys.items():
    if isinstance(kind, Duration):
      values = _read_duration(path, name, kind, entry)
      for key, value in values.items():
        options.check_value(value, kind.number, f"{path}.{key}")
      if not values and kind.default is not None:
        values = {f"{name}_steps": kind.default}
      out |= values
      units += [f"{name}_{unit}" for unit in kind.units]
    else:
      kind, default = kind if isinstance(kind, tuple) else (kind, REQUIRED)
      out[name] = _value(f"{path}.{name}", kind, entry.get(name), default)
  unknown = {k: v for k, v in entry.items() if k not in (*out, *units)}
  if unknown and type(keys) not in (Open, Entries):
    key = next(iter(unknown))
    raise ConfigError(
      f"{path}.{key} is an unknown key. {did_you_mean(key, [*out, *units])}"
    )
  return unknown | out


def _value(path: str, kind: Any, value: Any, default: Any) -> Any:
  """The checked value of a key."""
  if value is None and default is not REQUIRED:
    return default
  if isinstance(kind, Scheduled) and not isinstance(value, Mapping):
    kind, _ = kind["value"]
  if isinstance(kind, Entries):
    if not isinstance(value or {}, Mapping):
      raise ConfigError(
        f"{path} is {value!r}, expected named entries (a dict)."
      )
    entries = {}
    for name, entry in (value or {}).items():
      if isinstance(entry, Mapping) and "type" in kind:
        entry = {"type": name} | entry
      # None removes an entry, for example on the command line.
      if entry is not None:
        entries[name] = _section(f"{path}.{name}", kind, entry)
    return entries
  if isinstance(kind, Mapping):
    return _section(path, kind, value or {})
  if value is None:
    raise ConfigError(f"{path} is missing; it has no default.")
  return options.check_value(value, kind, path)


# ---------------------------------------------------------------------------
# Durations: NAME_steps | NAME_epochs | NAME_examples | NAME_percent.


def _read_duration(
  path: str, name: str, kind: Duration, section: Config
) -> dict[str, Any]:
  """A section's duration as {key: value}; {} if it gives none."""
  keys = [f"{name}_{unit}" for unit in kind.units]
  durations = {k: section[k] for k in keys if section.get(k) is not None}
  if len(durations) > 1 or (kind.default is REQUIRED and not durations):
    got = ", ".join(f"{k}={v}" for k, v in durations.items()) or "none"
    raise ConfigError(
      f"{path}: give exactly one of {', '.join(keys)}; got {got}."
    )
  return durations


@dataclasses.dataclass(frozen=True)
class RunLength:
  """Converts durations to steps."""

  batch_size: int
  examples_per_epoch: int | None = None  # None if the data are endless.
  total_steps: int | None = None

  @classmethod
  def from_config(
    cls, config: Config, examples_per_epoch: int | None = None
  ) -> "RunLength":
    """From `total_steps`, `total_epochs` or `total_examples` of a config."""
    length = cls(config["batch_size"], examples_per_epoch)
    return dataclasses.replace(
      length, total_steps=length.steps("total", config)
    )

  def steps(self, name: str, section: Config, default: Any = REQUIRED) -> Any:
    """Converts the duration `name` of a section to steps.

    A positive duration is at least one step.

    Returns `default` if the section lacks it.

    Raises:
      ConfigError: no key or several are given, or one that can't be converted.
    """
    durations = _read_duration("config", name, Duration(default), section)
    if not durations:
      return default
    ((key, value),) = durations.items()
    options.check_value(value, NonNegativeFloat, key)
    unit = key.removeprefix(f"{name}_")
    if unit == "steps":
      if value != int(value):
        raise ConfigError(f"{key} is {value!r}, expected a whole number.")
      return int(value)
    if unit == "percent":
      if self.total_steps is None:
        raise ConfigError(f"{key} needs a run of known length.")
      count = value / 100 * self.total_steps
    elif unit == "examples":
      count = value / self.batch_size
    else:
      if self.examples_per_epoch is None:
        raise ConfigError(
          f"{key}: this data has no known length; use {name}_steps or"
          f" {name}_examples."
        )
      count = value * self.examples_per_epoch / self.batch_size
    return max(round(count), 1) if value else 0


# ---------------------------------------------------------------------------
# Typed arguments of a config file: "tiny,batch=64".


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Parses what follows the colon in `--config=file.py:tiny,batch=64`.

  A bare name sets a bool to True. The defaults give the types; None allows any
  literal or string.

  Raises:
    ConfigError: an unknown name, or a value of the wrong type.
  """
  out = dict(defaults)
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      raise ConfigError(
        f"this config has no argument {name!r}. {did_you_mean(name, defaults)}"
      )
    default = defaults[name]
    if not equals and not isinstance(default, bool):
      raise ConfigError(f"argument {name!r} needs a value: {name}=...")
    key = f"argument {name}"
    out[name] = overrides.parse_value(text, default, key) if equals else True
    if isinstance(default, tuple) and not isinstance(out[name], list | tuple):
      raise ConfigError(f"{key}={text!r}; expected a list")
  return ConfigDict(out)


def read_config(path: str, **arguments: Any) -> ConfigDict:
  """The config of a recipe.

  The path is a file or a packaged recipe, with arguments after a colon, such as
  `FOLDER/NAME.py` or `NAME:tiny,batch=64`.

  Raises:
    ConfigError: no such recipe, or a file without a `get_config`.
  """
  name, _, arg = path.partition(":")
  file = pathlib.Path(name)
  if not file.is_file():
    folder = pathlib.Path(configs.__path__[0])
    recipes = sorted(file.stem for file in folder.glob("[!_]*.py"))
    # Outside of a checkout `configs/NAME.py` is the packaged recipe, too.
    recipe = name.removeprefix("configs/").removesuffix(".py")
    if recipe not in recipes:
      raise ConfigError(
        f"there is no config {name!r}. {did_you_mean(name, recipes)}"
      )
    file = folder / f"{recipe}.py"
  values = runpy.run_path(str(file))
  if "get_config" not in values:
    raise ConfigError(f"{file} defines no get_config(arg).")
  pairs = [arg, *(f"{key}={value}" for key, value in arguments.items())]
  return values["get_config"](",".join(filter(None, pairs)) or None)
