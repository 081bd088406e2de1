"""The train state, and the specification of the step that updates it."""

import collections
import dataclasses
import functools
import math
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree, UInt32

from mtv_jax.augment import views as views_lib
from mtv_jax.config.feature_layout import FeatureLayout
from mtv_jax.models import two_tower as model_lib
from mtv_jax.models.lora import LoraConfig
from mtv_jax.models.remat import Remat
from mtv_jax.objectives import base
from mtv_jax.train.balance import Balance
from mtv_jax.train.mup import Multiplier, Mup, scale_init
from mtv_jax.train.optim.schedules import RampShape, half_cosine, ramp_factor
from mtv_jax.train.teachers import FrozenTeacher
from mtv_jax.utils.errors import ConfigError, did_you_mean
from mtv_jax.utils.tree import pytree_dataclass


@pytree_dataclass
class TrainState:
  """All arrays that training updates and a checkpoint stores."""

  step: Int[Array, ""]  # Number of updates done.
  params: PyTree  # `image`, `text` and `heads/NAME`, float32.
  opt_state: Any  # Moments have the parameters' names and shapes.
  # EMA of `image` and heads, or of heads; {} if no objective reads it.
  teacher: PyTree
  # EMA of all parameters, or the optimizer's average, for evaluation and
  # export; or {}.
  ema: PyTree
  statistics: PyTree  # By objective, such as DINO's centre.
  # Frozen encoders of `config.teachers` by name, each `{image: ...}`, or {}.
  teachers: PyTree = flax.struct.field(default_factory=dict)
  # State of the balancing method, see `train/balance.py`, or {}.
  balance: PyTree = flax.struct.field(default_factory=dict)

  @property
  def fixed_params(self) -> dict[str, PyTree]:
    """The parameters without gradient, by `Encoding.weights`."""
    return {"teacher": self.teacher, **self.teachers}

  def weights(self, which: str) -> PyTree:
    """The parameters to evaluate: `'student'`, `'teacher'` or `'ema'`.

    A teacher's image encoder comes with the student's text tower and heads.
    """
    weights = {"student": self.params}
    if self.ema:
      weights["ema"] = self.ema
    if "image" in self.teacher:
      weights["teacher"] = {**self.params, "image": self.teacher["image"]}
    if which not in weights:
      hint = did_you_mean(str(which), weights)
      raise ConfigError(
        f"this run has no {which!r} weights. {hint} 'ema' needs config.ema or "
        "an optimizer that averages, "
        "'teacher' needs an objective that reads it and teacher.ema='all'."
      )
    return weights[which]


@dataclasses.dataclass(frozen=True)
class ObjectiveWeight:
  """An objective's weight in the total loss, by step.

  The objective is computed from step `start` on; its weight increases to
  `value` over `ramp` steps, see `schedules.ramp_factor`.
  """

  value: float
  start: int = 0
  ramp: int = 0
  ramp_shape: RampShape = "linear"

  def is_active(self, step: int) -> bool:
    """Whether update `step`, counted from 0, computes the objective."""
    return step >= self.start

  def __call__(self, step: Any) -> Float[Array, ""]:
    """The weight while the objective is active."""
    since = jnp.asarray(step, jnp.float32) - self.start
    return self.value * ramp_factor(since, self.ramp, self.ramp_shape)


@dataclasses.dataclass(frozen=True)
class StepSpec:
  """What the train step computes."""

  model: model_lib.ModelSpec
  dtype: Any  # Computation dtype; parameters and losses are float32.
  objectives: Mapping[str, base.Objective]
  weights: Mapping[str, ObjectiveWeight]
  views: Mapping[str, views_lib.View]
  seed: int | UInt32[Array, ""]  # Traced inside of `Program.jit`, else int.
  total_steps: int
  init: str = "big_vision"  # The towers' initialisation, see `models/init.py`.
  # The towers' options beyond their architecture (scan, drop_path).
  runtime: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  remat: Remat = Remat("none")  # The towers' remat policy, by encoding.
  teacher_momentum: float = 0.996  # EMA momentum at the start.
  teacher_end: float | None = None  # End of a half cosine; None: constant.
  # EMA of `all` parameters, or of the `heads` on the student's encoder.
  teacher_ema: str = "all"
  ema_decay: float | None = None  # EMA of all parameters.
  # The optimizer's parameters to evaluate, see `Optimizer.eval_params`.
  eval_params: Callable[[Any, Any], Any] | None = None
  accumulate: int = 1  # Parts of a batch, encoded one at a time.
  in_lanes: bool = False  # Order of the data, see `data.lanes`.
  # Names of parameters that are neither differentiated nor updated.
  frozen: frozenset[str] = frozenset()
  # The entries of `config.teachers` that an objective reads.
  teachers: Mapping[str, FrozenTeacher] = dataclasses.field(
    default_factory=dict
  )
  balance: Balance = Balance()  # Default: the config's weights.
  mup: Mup | None = None
  lora: LoraConfig | None = None

  def __post_init__(self):
    if not self.objectives:
      raise ConfigError("config.objectives is empty.")
    for name, objective in self.objectives.items():
      self._check_objective(f"config.objectives.{name}", objective)
    # Views resized to the encodings' sizes.
    resized_views = {
      e.view_name: views_lib.resize_view(self.views[e.view], e.size)
      for e in self.plan
      if e.size
    }
    object.__setattr__(self, "views", {**self.views, **resized_views})

  def _check_objective(self, where: str, objective: base.Objective) -> None:
    """Raises ConfigError if a teacher, view or tower is missing."""
    encodings = objective.needs().encodings
    for e in encodings:
      if e.weights not in (base.STUDENT, base.TEACHER, *self.teachers):
        raise ConfigError(
          f"{where} reads the teacher {e.weights!r}, which config.teachers "
          f"lacks; expected one of {sorted(self.teachers)}."
        )
      if e.tower == "text" and self.model.text is None:
        raise ConfigError(f"{where} reads text, but config.model.text is None.")
      if e.tower == "image" and e.view not in self.views:
        raise ConfigError(
          f"{where} reads the view {e.view!r}, which config.views lacks; "
          f"expected one of {sorted(self.views)}."
        )
      if e.tower == "image":
        self._check_patch_size(e)
    reads_teacher = any(e.weights == base.TEACHER for e in encodings)
    has_teacher_head = any(head.teacher for head in objective.heads().values())
    if self.teacher_ema == "heads" and reads_teacher and not has_teacher_head:
      raise ConfigError(
        f"{where} would compare the student with itself: with "
        "config.teacher.ema='heads' the EMA teacher has the student's encoder. "
        "Set teacher.ema='all', or read a teacher of config.teachers."
      )

  def _check_patch_size(self, encoding: base.Encoding) -> None:
    """Raises ConfigError if patch sizes of a view's mask and tower differ."""
    mask = self.views[encoding.view].pipelines[0].mask
    if mask is None or encoding.size:  # Resized views lack a mask.
      return
    # `blocks` does not mask patches for teachers.
    if encoding.weights != base.STUDENT and mask.field != "keep":
      return
    teacher = self.teachers.get(encoding.weights)
    spec = self.model if teacher is None else teacher.model
    patch = spec.image.patch_size
    if mask.patch != patch:
      raise ConfigError(
        f"config.views.{encoding.view}: {mask.name}() has patches of "
        f"{mask.patch} pixels, but {encoding} has patches of {patch}: write "
        f"{mask.name}(..., patch={patch})."
      )

  @functools.cached_property
  def plan(self) -> dict[base.Encoding, tuple[int, ...]]:
    """The distinct encodings, with the union of the layers read."""
    union: dict[base.Encoding, set[int]] = {}
    for objective in self.objectives.values():
      for encoding, layers in objective.needs().encodings.items():
        union.setdefault(encoding, set()).update(layers)
    return {e: tuple(sorted(union[e])) for e in sorted(union)}

  @functools.cached_property
  def towers(self) -> dict[base.Encoding, nn.Module]:
    """The tower, a linen module, of each encoding."""
    towers = {}
    for e in self.plan:
      remat = self.remat.choose(e.tower, e.view)
      options = dict(dtype=self.dtype, **self.runtime, remat=remat)
      if e.weights in self.teachers:  # Target features are not quantized.
        model = self.teachers[e.weights].model
        options["quantization"] = "none"
        towers[e] = model_lib.image_tower(model, **options)
      elif e.tower == "image":
        towers[e] = model_lib.image_tower(self.model, **options)
      else:
        towers[e] = model_lib.text_tower(self.model, **options)
    return towers

  @functools.cached_property
  def first_read_steps(self) -> dict[str, int]:
    """The first step that reads each teacher, or the student."""
    return find_first_read_steps(self.objectives, self.weights)

  @functools.cached_property
  def heads(self) -> dict[str, base.Head]:
    """The heads of all objectives, by global name."""
    heads = {}
    for name, objective in self.objectives.items():
      for key, head in objective.heads().items():
        if key in heads and not _are_equal_heads(heads[key], head, self.model):
          raise ConfigError(
            f"objective {name!r} and another objective both declare"
            f" heads/{key}, with different settings. Rename one of the heads."
          )
        heads[key] = head
    return heads

  @functools.cached_property
  def shared_modules(self) -> frozenset[str]:
    """Modules (`image`, `text`, `heads/NAME`) that several objectives train."""
    readers = collections.Counter()
    for objective in self.objectives.values():
      encodings = objective.needs().encodings
      readers.update({e.tower for e in encodings if e.weights == base.STUDENT})
      readers.update(f"heads/{name}" for name in objective.heads())
    return frozenset(name for name, count in readers.items() if count > 1)

  @property
  def start_steps(self) -> dict[str, int]:
    """First update by parameter-name prefix; the earliest for a shared head."""
    starts: dict[str, int] = {}
    for objective_name, objective in self.objectives.items():
      start = self.weights[objective_name].start
      num_steps = self.total_steps - start
      for key, head in objective.heads().items():
        for part, percent in head.frozen_percent.items():
          # Rounded, because 7 / 100 * 100 is above 7.
          step = start + math.ceil(round(percent / 100 * num_steps, 6))
          name = f"heads/{key}/{part}/"
          starts[name] = min(step, starts.get(name, step))
    return starts

  @property
  def attention_heads(self) -> dict[str, int]:
    """Attention heads of each stack of blocks, by parameter-name prefix."""
    towers = {"image": self.model.image, "text": self.model.text}
    stacks = {f"heads/{n}": h.module for n, h in self.heads.items()} | towers
    return {n: s.heads for n, s in stacks.items() if hasattr(s, "heads")}

  @functools.cached_property
  def mup_multipliers(self) -> dict[str, Multiplier]:
    """muP's multipliers by parameter name; empty without muP."""
    if self.mup is None:
      return {}
    shapes = (
      jax.eval_shape(functools.partial(_init_unscaled, s), jax.random.key(0))
      for s in (self, self.mup.base)
    )
    return self.mup.multipliers(self, *shapes)

  def active_objectives(self, step: int) -> tuple[str, ...]:
    """The objectives that update `step`, counted from 0, computes."""
    return tuple(n for n, w in self.weights.items() if w.is_active(step))

  def select_objectives(self, names: tuple[str, ...]) -> "StepSpec":
    """This specification with only the named objectives."""
    if tuple(names) == tuple(self.objectives):
      return self
    return dataclasses.replace(
      self,
      objectives={name: self.objectives[name] for name in names},
      weights={name: self.weights[name] for name in names},
    )

  @functools.cached_property
  def has_balance(self) -> bool:
    """Whether a balancing method is configured (weights are not fixed)."""
    return type(self.balance) is not Balance

  def config_weights(self, step: Any) -> dict[str, Array]:
    """Each objective's configured weight, including its ramp."""
    return {name: weight(step) for name, weight in self.weights.items()}

  def loss_weights(self, state: TrainState) -> Mapping[str, Array]:
    """Each objective's weight in the total loss, including the balance."""
    weights = self.config_weights(state.step)
    if not self.has_balance:
      return weights
    return self.balance.loss_weights(weights, state.balance)

  def momentum(self, step: Any) -> Float[Array, ""]:
    """The EMA teacher's momentum in update `step`, counted from 0."""
    start = jnp.float32(self.teacher_momentum)
    if self.teacher_end is None:
      return start
    return half_cosine(step, start, self.teacher_end, self.total_steps - 1)

  def merge_adapters(self, tree: PyTree) -> PyTree:
    """Merges the LoRA adapters, if any, of a branch of the parameters."""
    return tree if self.lora is None else self.lora.merge(tree)

  @property
  def has_ema(self) -> bool:
    """Whether the state has an average of all parameters."""
    return self.ema_decay is not None or self.eval_params is not None

  @functools.cached_property
  def has_teacher(self) -> bool:
    """Whether an objective reads the EMA teacher."""
    return any(e.weights == base.TEACHER for e in self.plan)

  @functools.cached_property
  def feature_layouts(self) -> dict[str, FeatureLayout]:
    """The cached features that objectives read, by teacher."""
    layouts: dict[str, FeatureLayout] = {}
    for objective in self.objectives.values():
      for name, layout in objective.needs().features.items():
        old_shapes = layouts[name].shapes if name in layouts else {}
        shapes = {**old_shapes, **layout.shapes}
        layouts[name] = FeatureLayout(layout.format, shapes)
    return layouts

  def fields(self) -> dict[str, list[str]]:
    """The objectives that read each batch field, by field name."""
    readers = {f: list(self.objectives) for f in ("image", "image_size")}
    for name, objective in self.objectives.items():
      needs = objective.needs()
      fields = [*needs.fields]
      for teacher, layout in needs.features.items():
        fields += layout.fields(teacher)
      for field in fields:
        readers.setdefault(field, []).append(name)
    return readers


def find_first_read_steps(
  objectives: Mapping[str, base.Objective],
  weights: Mapping[str, ObjectiveWeight],
) -> dict[str, int]:
  """The first step that reads each set of weights, by `Encoding.weights`."""
  steps: dict[str, int] = {}
  for name, objective in objectives.items():
    start = weights[name].start
    for encoding in objective.needs().encodings:
      steps[encoding.weights] = min(start, steps.get(encoding.weights, start))
  return steps


def _are_equal_heads(a: base.Head, b: base.Head, spec: Any) -> bool:
  """Whether two heads have equal modules, bounds, options and input widths."""

  def shapes(head):
    leaves = jax.tree.leaves(head.example(spec))
    return [jnp.shape(leaf)[-1:] for leaf in leaves]

  keys = ("module", "bounds", "prediction")
  is_equal = all(getattr(a, key) == getattr(b, key) for key in keys)
  return is_equal and shapes(a) == shapes(b)


def teacher_params(spec: StepSpec, params: Mapping[str, PyTree]) -> PyTree:
  """The student's parameters that the teacher averages.

  With `teacher_ema="heads"` only heads: the teacher's encoder is the student's
  current one, without gradient (TIPSv2, arXiv 2604.12012).
  """
  if not spec.has_teacher:
    return {}
  names = [name for name, head in spec.heads.items() if head.teacher]
  heads = {name: params["heads"][name] for name in names}
  if spec.teacher_ema == "heads":
    return {"heads": heads}
  return {"image": params["image"], "heads": heads}


def init_params(spec: StepSpec, rng: jax.Array) -> PyTree:
  """Initialises parameters `{image, text, heads}`, float32.

  A head's key depends only on its name, so adding or dropping an objective does
  not change other parameters.
  """
  params = _init_unscaled(spec, rng)
  if spec.lora is not None:
    return spec.lora.add(params, rng)
  if spec.mup is None:
    return params
  inits = (functools.partial(_init_unscaled, s) for s in (spec, spec.mup.base))
  return scale_init(params, spec.mup_multipliers, *inits)


def _init_unscaled(spec: StepSpec, rng: jax.Array) -> PyTree:
  """`init_params` without muP."""
  tower_rng, head_rng = jax.random.split(rng)
  params = dict(model_lib.init_params(spec.model, tower_rng, spec.init))
  params["heads"] = {}
  for name, head in spec.heads.items():
    # crc32, because hash() differs between processes.
    key = jax.random.fold_in(head_rng, zlib.crc32(name.encode()))
    params["heads"][name] = head.init(key, spec.model)
  return params


def init_state(
  spec: StepSpec,
  tx: optax.GradientTransformation,
  params: PyTree,
  teachers: Mapping[str, PyTree] = types.MappingProxyType({}),
  teacher: PyTree | None = None,
) -> TrainState:
  """Initialises the state at step 0.

  The EMA and, if not given, the `teacher` and frozen `teachers` start as copies
  of the student; a frozen teacher of another architecture is random.
  """
  copy = functools.partial(jax.tree.map, jnp.copy)

  def init_frozen_teacher(name, teacher):
    if name in teachers:
      return teachers[name]
    if teacher.model.image == spec.model.image:
      return {"image": copy(spec.merge_adapters(params["image"]))}
    key = jax.random.key(spec.seed)
    rng = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return {"image": model_lib.init_params(teacher.model, rng)["image"]}

  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    teacher=copy(teacher_params(spec, params)) if teacher is None else teacher,
    ema=copy(params) if spec.has_ema else {},
    statistics={n: o.initial_statistics() for n, o in spec.objectives.items()},
    teachers={n: init_frozen_teacher(n, t) for n, t in spec.teachers.items()},
    balance=spec.balance.init(spec.objectives),
  )


def abstract_params(spec: StepSpec) -> PyTree:
  """Shapes and dtypes of the parameters, without computing them."""
  return jax.eval_shape(functools.partial(init_params, spec), jax.random.key(0))


def abstract_state(
  spec: StepSpec, tx: optax.GradientTransformation
) -> TrainState:
  """Shapes and dtypes of the state, without computing it."""
  init = functools.partial(init_state, spec, tx)
  return jax.eval_shape(init, abstract_params(spec))
