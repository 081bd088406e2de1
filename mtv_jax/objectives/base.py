"""Base class of objectives: `needs`, `heads`, `loss_inputs` and `loss`.

`loss_inputs` runs on any part of the batch and returns small per-example
arrays; `loss` sees them for the global batch. Contrastive losses, Sinkhorn and
KoLeo need the whole batch, so they belong in `loss`; expensive computation
belongs in `loss_inputs`. The split also makes gradient accumulation exact.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mtv_jax.config.feature_layout import FeatureLayout
from mtv_jax.models.heads.base import PredictionHead
from mtv_jax.models.standardization import Moments
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.tree import pytree_dataclass

STUDENT = "student"
TEACHER = "teacher"
NO_TEACHERS: Mapping[str, Any] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True, order=True)
class Encoding:
  """One forward pass: a tower on a view, by the student or a teacher."""

  tower: str  # 'image' or 'text'.
  # A key of `config.views`; for the text tower a batch field of token ids.
  view: str
  # `STUDENT`, `TEACHER` (its EMA), or a name in `config.teachers`.
  weights: str = STUDENT
  # Pixels per side of the crops for this encoding; 0: the view's size.
  size: int = 0
  # Below 1, a device encodes each distinct text once; if a device has more than
  # this share of distinct rows, all texts are encoded.
  distinct: float = 1.0

  def __str__(self):
    return f"{self.tower}({self.view_name}, {self.weights})"

  @property
  def view_name(self) -> str:
    """Name in `StepSpec.views` of the view at this size."""
    return f"{self.view}@{self.size}" if self.size else self.view


@dataclasses.dataclass(frozen=True)
class Needs:
  """What an objective reads."""

  # Layers to return by encoding, from 0; `()` reads only the final output.
  encodings: Mapping[Encoding, tuple[int, ...]]
  fields: tuple[str, ...] = ()  # Batch fields: labels and masks.
  # Layouts of cached teacher features in label sets, by teacher.
  features: Mapping[str, FeatureLayout] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class Head:
  """A linen module with parameters `heads/NAME`."""

  # A module with a field `mesh` shards its rows over that mesh, and gathers the
  # blocks of the subtrees in its class attribute `stacks`, if any, one by one.
  module: nn.Module
  # `(model_spec) -> args` to initialise the module: trees whose
  # `jax.ShapeDtypeStruct`s become zeros.
  example: Callable[[Any], tuple] = lambda spec: ()
  teacher: bool = False  # Whether the EMA teacher has a copy.
  # By submodule: percentage of the run, from the objective's start, during
  # which the submodule is frozen. Optimizer moments still advance.
  frozen_percent: Mapping[str, float] = dataclasses.field(default_factory=dict)
  # (lowest, highest) value by parameter; clips the parameter after each update.
  bounds: Mapping[str, tuple[float, float]] = dataclasses.field(
    default_factory=dict
  )
  prediction: PredictionHead | None = None  # Configuration of `module`.

  @classmethod
  def of(cls, head: PredictionHead) -> dict[str, Head]:
    """Wraps a prediction head, keyed by the name of its parameters."""
    return {head.params_key: cls(head.module(), head.example, prediction=head)}

  def init(self, rng: jax.Array, spec: Any) -> dict[str, Any]:
    """Initialises the module's parameters."""

    def zeros(x):
      is_shape = isinstance(x, jax.ShapeDtypeStruct)
      return jnp.zeros(x.shape, x.dtype) if is_shape else x

    example = jax.tree.map(zeros, self.example(spec))
    return self.module.init(rng, *example)["params"]


# Tower outputs by encoding; batch fields by name, with `views`.
Encodings = Mapping[Encoding, Any]
Batch = Mapping[str, Any]


class BoundHeads:
  """Heads bound to their parameters: `heads['dino'](x)`.

  `heads['dino', 'teacher'](x)` runs the teacher's copy.
  """

  def __init__(
    self,
    heads: Mapping[str, Head],
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
  ):
    self._heads, self._mesh = heads, mesh
    self._params = {STUDENT: student, TEACHER: teacher or {}}

  def __getitem__(self, key: str | tuple[str, str]) -> Callable[..., Any]:
    name, weights = (key, STUDENT) if isinstance(key, str) else key
    if name not in self._params[weights]:
      raise KeyError(
        f"head '{name}' has no {weights} parameters; heads that have them: "
        f"{sorted(self._params[weights])}. Head(teacher=True) adds an EMA copy."
      )
    params = {"params": self._params[weights][name]}
    module = self._heads[name].module
    if hasattr(module, "mesh"):
      module = module.clone(mesh=self._mesh)
    return functools.partial(module.apply, params)


@pytree_dataclass
class WeightedMean:
  """A weighted mean as sum and count, divided after the global reduction.

  The mean of a zero count is 0, never NaN.
  """

  sum: Float[Array, ""]
  count: Float[Array, ""]

  def value(self) -> Float[Array, ""]:
    """Sum / count; 0, also in the gradient, for a zero count."""
    divisor = jnp.where(self.count > 0, self.count, 1.0)
    return jnp.where(self.count > 0, self.sum / divisor, 0.0)


@pytree_dataclass
class Terms:
  """The loss of the global batch, its diagnostics and running statistics."""

  loss: WeightedMean
  report: dict[str, WeightedMean] = flax.struct.field(default_factory=dict)
  statistics: dict[str, Array] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Context:
  """Step, running statistics, random key and mesh, for a loss."""

  step: Any  # Updates since the objective started, a traced scalar.
  total_steps: int  # From the objective's start to the end of the run.
  statistics: Mapping[str, Array]
  mesh: Mesh | None = None  # Shards the batch.
  in_lanes: bool = False  # Whether consecutive rows come from few shards.
  # A random key from seed, step and the objective's name: equal on all devices,
  # and independent of the data. Per-row keys are in the batch of `loss_inputs`.
  key: jax.Array | None = None


def check_visible(
  what: str,
  name: str,
  views: Mapping[str, Any],
  allow_masked: bool = False,
  *,
  has_option: bool = False,
) -> None:
  """Raises ConfigError if the view `name` hides patches from the student.

  `allow_masked` permits masked patches, which still have outputs. `has_option`:
  the objective has the option `allow_masked`, so the error suggests it.
  """
  view = views.get(name)
  if view is None or view.patch is None or (allow_masked and view.max_masked):
    return
  verb = "hides" if view.max_masked else "drops"
  ops = "keep" if allow_masked else "blocks and keep"
  has_option = has_option and view.max_masked
  option = ", or set allow_masked=True" if has_option else ""
  raise ConfigError(
    f"{what} needs all patches, but the view {name!r} {verb} some. Name a "
    f"view without {ops}{option}."
  )


@dataclasses.dataclass(frozen=True)
class Objective:
  """Base class of objectives: one file each, registered in `__init__.py`.

  `type="MODULE:NAME"` in a config entry names a subclass in a user's module.

  A subclass is a frozen dataclass. Its fields are its hyper-parameters; their
  annotations validate the config entry (`config.options`). If it trains a
  prediction head (`models.heads.base`), it has a field `head`, whose default
  is the head class called without arguments.
  """

  # The objective's group in studies; "" puts each type in a group of its own.
  group: ClassVar[str] = ""

  def resolve(
    self,
    spec: Any,  # `two_tower.ModelSpec`.
    views: Mapping[str, Any],  # `views.View` by name.
    teachers: Mapping[str, Any] = NO_TEACHERS,  # All `FrozenTeacher`s, by name.
  ) -> Objective:
    """Fills in unset options from the model, views and teachers.

    Ignores a missing view: the trainer rejects it for any objective. Raises
    ConfigError if the model, the views or the teachers don't fit the objective.
    """
    del spec, views, teachers
    return self

  @property
  def image(self) -> Encoding:
    """The student's encoding of `self.view`."""
    return Encoding("image", self.view)

  def needs(self) -> Needs:
    """The encodings and batch fields that the objective reads."""
    raise NotImplementedError

  def heads(self) -> dict[str, Head]:
    """Heads by name; names are global, so objectives can share a head."""
    return {}

  def initial_statistics(self) -> dict[str, jax.Array]:
    """Initial running statistics, such as DINO's centre."""
    return {}

  @property
  def num_statistics_examples(self) -> int:
    """Examples that `fit_statistics` needs before step 0; 0 skips it."""
    return 0

  def statistics_features(
    self, encodings: Encodings, batch: Batch
  ) -> dict[str, tuple[Array, Array]]:
    """Features for `fit_statistics` by name, from frozen teachers' encodings.

    Returns pairs of features `[b, ..., d]` and weights `[b, ...]` of 0 or 1.
    """
    del encodings, batch
    return {}

  def fit_statistics(
    self, moments: Mapping[str, Moments]
  ) -> dict[str, np.ndarray]:
    """Fits statistics to moments of `statistics_features`, on the host."""
    del moments
    return {}

  def loss_inputs(
    self, encodings: Encodings, heads: BoundHeads, batch: Batch
  ) -> Any:
    """Computes small per-example arrays `[b, ...]` for any part of the batch.

    `encodings` are the outputs of `needs().encodings`. The batch has its
    fields, `views` (`views.ViewBatch` by name), `keys` (row keys `[b]` by view,
    for further randomness) and the objective's `statistics`.
    """
    raise NotImplementedError

  def loss(
    self, loss_inputs: Any, heads: BoundHeads, context: Context
  ) -> Terms:
    """Computes the loss from the global batch's loss inputs `[B, ...]`."""
    raise NotImplementedError
