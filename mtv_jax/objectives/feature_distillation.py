"""Feature distillation from frozen teachers (AM-RADIO, PHI-S).

One adaptor per teacher and feature maps the student's pooled vector or patches
to the teacher's. With weights l_i and g_i of teacher i and cosine distances,

    L = sum_i l_i cos(pooled) + g_i (0.9 cos(patches) + 0.1 smooth_l1(patches))

(AM-RADIO, Ranzinger et al. 2023, arXiv 2312.06709, Eqs. 2 and 3, with all
weights 1). Teacher patches are standardised first (PHI-S, Ranzinger et al.
2024, arXiv 2410.01680).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtv_jax.config import options
from mtv_jax.config.feature_layout import FeatureLayout
from mtv_jax.models import standardization
from mtv_jax.models.heads.projection import Adaptor, unit
from mtv_jax.objectives import base
from mtv_jax.objectives.feature_targets import (
  SUMMARY,
  Target,
  is_cropped,
  make_targets,
)
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.tree import pytree_dataclass


def cosine_distance(
  x: Float[Array, "*b d"], y: Float[Array, "*b d"]
) -> Float[Array, "*b"]:
  """1 - cos(x, y)."""
  return 1.0 - jnp.sum(unit(x) * unit(y), axis=-1)


def smooth_l1(
  x: Float[Array, "*b d"], y: Float[Array, "*b d"]
) -> Float[Array, "*b"]:
  """Smooth L1 distance with threshold 1, averaged over channels.

  x^2 / 2 below the threshold, |x| - 1 / 2 above (Girshick 2015). AM-RADIO omits
  the threshold; 1 is PyTorch's default.
  """
  error = jnp.abs(x - y)
  smooth = jnp.where(error < 1.0, 0.5 * jnp.square(error), error - 0.5)
  return jnp.mean(smooth, axis=-1)


def per_example_mean(x: Float[Array, " b *n"]) -> Float[Array, " b"]:
  """Mean over all but the first axis."""
  return jnp.mean(x.reshape(len(x), -1), axis=1)


@pytree_dataclass
class LossInputs:
  """Per example, means over crops (and patches), by `Target.name`."""

  losses: dict[str, Float[Array, " b"]]  # 0 without a label.
  cosines: dict[str, Float[Array, " b"]]  # For the report.
  valid: dict[str, Float[Array, " b"]]  # 0 for a row without a label.


@dataclasses.dataclass(frozen=True)
class FeatureDistillation(base.Objective):
  """Distils pooled and patch features of frozen teachers.

  The finer of two patch grids is resampled to the coarser, with antialiasing;
  this is our choice. AM-RADIO interpolates to the finer grid (section 4), PHI-S
  the teacher's grid to the student's (section 3).
  """

  view: str = "image"  # The student's view; teachers see its crops.
  # Names in `config.teachers`. None: all teachers with a path.
  teachers: tuple[str, ...] | None = None
  # Restricts the loss to these sources, by index in `data.train`. None: all.
  sources: tuple[options.NonNegativeInt, ...] | None = None
  # Factors of the teachers' losses; default 1.
  teacher_weights: Mapping[str, options.NonNegativeFloat] = dataclasses.field(
    default_factory=dict
  )
  summary_weight: options.NonNegativeFloat = 1.0
  feature_weight: options.NonNegativeFloat = 1.0
  # 'none' compares features directly, with a teacher of equal width.
  adaptor: Literal["mlp", "none"] = "mlp"
  # Hidden units of an adaptor. None: the wider of the student and its teacher,
  # so that adding a teacher changes no adaptor. AM-RADIO uses the width of the
  # widest teacher (section 3.2).
  hidden: options.PositiveInt | None = None
  # Patch distance: AM-RADIO's 0.9 cosine + 0.1 smooth L1 (Eq. 3), or the mean
  # square, with which PHI-S compares all standardisations (Eq. 1).
  feature_loss: Literal["cosine_smooth_l1", "mse"] = "cosine_smooth_l1"
  cosine_share: options.Fraction = 0.9  # The rest is smooth L1.
  # Standardisation of teacher patches, see `models/standardization.py`; 'none'
  # in AM-RADIO. Without adaptors it also applies to student patches.
  normalize: standardization.Method = "phi_s"
  # Training examples that give mean and covariance, before step 0.
  statistics_examples: options.PositiveInt = 2048
  # Set by `resolve`.
  targets: tuple[Target, ...] | None = None
  width: options.PositiveInt | None = None  # The student's width.

  def __post_init__(self):
    if not self.summary_weight and not self.feature_weight:
      raise ConfigError("summary_weight and feature_weight are both 0.")

  def resolve(
    self, spec, views, teachers=base.NO_TEACHERS
  ) -> FeatureDistillation:
    base.check_all_patches("feature_distillation", [self.view], views)
    names = self.teachers
    if names is None:
      names = tuple(n for n, t in teachers.items() if not t.snapshot)
    if not names:
      raise ConfigError(
        "feature_distillation: config.teachers names no encoder. Add one: "
        "config.teachers.NAME = dict(path='FOLDER')."
      )
    unknown = {*names, *self.teacher_weights} - {*teachers}
    if unknown:
      raise ConfigError(
        f"feature_distillation names the teachers {sorted(unknown)}, which "
        f"config.teachers lacks; there are: {sorted(teachers)}."
      )
    if self.view not in views:
      raise ConfigError(
        f"feature_distillation reads the view {self.view!r}, which "
        f"config.views lacks; there are: {sorted(views)}."
      )
    targets = []
    for name in names:
      self._check_normalize(name, teachers[name])
      targets += self._targets_of(name, teachers[name], spec, views[self.view])
    return dataclasses.replace(
      self, teachers=names, targets=tuple(targets), width=spec.image.width
    )

  def _check_normalize(self, name: str, teacher: Any) -> None:
    """Raises ConfigError for a teacher that `normalize` does not support."""
    if not self.num_statistics_examples:
      return
    if teacher.copies:
      raise ConfigError(
        f"feature_distillation: the teacher {name!r} is copied from the EMA "
        "teacher later, and its statistics are estimated at the start. Set "
        "normalize='none', or give it a path without update_every."
      )
    width = teacher.model.image.width
    if self.normalize == "phi_s":
      try:
        standardization.hadamard(width)
      except InputError as error:
        raise ConfigError(
          f"feature_distillation: normalize='phi_s' of the teacher {name!r} of "
          f"{width} channels: {error}. Set normalize='whiten' or "
          "'standardize'."
        ) from None

  def _targets_of(
    self, name: str, teacher: Any, spec: Any, view: Any
  ) -> list[Target]:
    """Builds the targets of one teacher."""
    student = spec.image
    if teacher.cached and is_cropped(view) and self.summary_weight:
      raise ConfigError(
        f"feature_distillation: label sets of {name!r} have pooled features of "
        f"whole images, and the view {self.view!r} crops them. Name a view of "
        "'resize', or set summary_weight=0."
      )
    targets = make_targets(
      name,
      teacher,
      student,
      view,
      summary=bool(self.summary_weight),
      features=bool(self.feature_weight),
    )
    for target in targets if self.adaptor == "none" else ():
      summary = target.kind == SUMMARY
      ours = student.embed_dim if summary else student.width
      if ours != target.channels:
        raise ConfigError(
          f"feature_distillation: features of {ours} channels can't be "
          f"compared with those of the teacher {name!r}, {target.channels}, "
          "without an adaptor. Set adaptor='mlp'."
        )
    return targets

  def _resolved(self) -> tuple[Target, ...]:
    if self.targets is None:
      raise ConfigError(
        "feature_distillation: the teachers are not known; resolve() it."
      )
    return self.targets

  def needs(self) -> base.Needs:
    taps: dict[base.Encoding, set[int]] = {self.image: set()}
    layouts: dict[str, FeatureLayout] = {}
    for target in self._resolved():
      if target.cached:
        layout = layouts.setdefault(
          target.teacher, FeatureLayout(target.cached, {})
        )
        layout.shapes[target.kind] = (target.num_vectors, target.channels)
        continue
      read = taps.setdefault(target.encoding, set())
      if target.tap is not None:
        read.add(target.tap)
    encodings = {e: tuple(sorted(t)) for e, t in taps.items()}
    fields = () if self.sources is None else ("source",)
    return base.Needs(encodings, fields, features=layouts)

  def heads(self) -> dict[str, base.Head]:
    if self.adaptor == "none":
      return {}
    heads = {}
    for target in self._resolved():
      module = Adaptor(
        out=target.channels,
        hidden=self.hidden or max(self.width or 0, target.channels),
      )
      example = _pooled if target.kind == SUMMARY else _patches
      heads[f"adaptor_{target.name}"] = base.Head(module, example)
    return heads

  @property
  def num_statistics_examples(self) -> int:
    if self.normalize == "none" or not self.feature_weight:
      return 0
    return self.statistics_examples

  def _standardized(self) -> list[Target]:
    """The targets with statistics."""
    if not self.num_statistics_examples:
      return []
    return [t for t in self._resolved() if t.kind != SUMMARY]

  def initial_statistics(self) -> dict[str, jax.Array]:
    statistics = {}
    for target in self._standardized():
      statistics[f"{target.name}_mean"] = jnp.zeros(target.channels)
      statistics[f"{target.name}_matrix"] = jnp.eye(target.channels)
    return statistics

  def statistics_features(
    self, encodings: base.Encodings, batch: base.Batch
  ) -> dict[str, tuple[Array, Array]]:
    features = {}
    for target in self._standardized():
      x = target.read(encodings, batch)  # [b, n, p, d]
      valid = self._read_valid(target, batch, len(x))[:, None, None]
      features[target.name] = x, jnp.broadcast_to(valid, x.shape[:-1])
    return features

  def _read_valid(
    self, target: Target, batch: base.Batch, rows: int
  ) -> Float[Array, " b"]:
    """1 for rows in the loss, see `Target.read_valid`."""
    valid = target.read_valid(batch, rows)
    if self.sources is not None:
      valid *= jnp.isin(batch["source"], jnp.asarray(self.sources))
    return valid

  def fit_statistics(
    self, moments: Mapping[str, standardization.Moments]
  ) -> dict[str, np.ndarray]:
    statistics = {}
    for name, values in moments.items():
      mean, matrix = standardization.fit_standardization(values, self.normalize)
      statistics[f"{name}_mean"] = mean.astype(np.float32)
      statistics[f"{name}_matrix"] = matrix.astype(np.float32)
    return statistics

  def loss_inputs(
    self, encodings: base.Encodings, heads: base.BoundHeads, batch: base.Batch
  ) -> LossInputs:
    student, statistics = encodings[self.image], batch["statistics"]
    standardized = self._standardized()
    losses, cosines, valid = {}, {}, {}
    for target in self._resolved():
      theirs = target.read(encodings, batch).astype(jnp.float32)
      valid[target.name] = self._read_valid(target, batch, len(theirs))
      ours = student.pooled  # [b, n, E]
      if target.kind != SUMMARY:
        ours = target.resize(student.patches)  # [b, n, p, D]
      if target in standardized:
        mean = statistics[f"{target.name}_mean"]
        matrix = statistics[f"{target.name}_matrix"]
        theirs = standardization.standardize(theirs, mean, matrix)
        if self.adaptor == "none":
          ours = standardization.standardize(ours, mean, matrix)
      if self.adaptor != "none":
        ours = heads[f"adaptor_{target.name}"](ours)
      distances = cosine_distance(ours, theirs)  # [b, n] or [b, n, p]
      cosines[target.name] = 1.0 - per_example_mean(distances)
      if target.kind != SUMMARY:
        distances = self._feature_distance(distances, ours, theirs)
      losses[target.name] = per_example_mean(distances) * valid[target.name]
    fixed = jax.lax.stop_gradient((cosines, valid))
    return LossInputs(losses, *fixed)

  def _feature_distance(
    self,
    cosine: Float[Array, "b n p"],
    ours: Float[Array, "b n p d"],
    theirs: Float[Array, "b n p d"],
  ) -> Float[Array, "b n p"]:
    """Distance per patch."""
    if self.feature_loss == "mse":
      return jnp.mean(jnp.square(ours - theirs), axis=-1)
    share = self.cosine_share
    return share * cosine + (1.0 - share) * smooth_l1(ours, theirs)

  def loss(
    self, loss_inputs: LossInputs, heads: base.BoundHeads, context: base.Context
  ) -> base.Terms:
    total, report = jnp.zeros(()), {}
    targets = self._resolved()
    for target in targets:
      valid = loss_inputs.valid[target.name]
      count = jnp.sum(valid)
      mean = base.WeightedMean(jnp.sum(loss_inputs.losses[target.name]), count)
      total += self._weight(target) * mean.value()
      report[f"{target.name}_loss"] = mean
      cosine = jnp.sum(loss_inputs.cosines[target.name] * valid)
      report[f"{target.name}_cosine"] = base.WeightedMean(cosine, count)
    every = jnp.stack([loss_inputs.valid[t.name] for t in targets])
    rows = jnp.sum(jnp.max(every, axis=0))  # Labelled by any teacher.
    report["labelled"] = base.WeightedMean(rows, jnp.float32(every.shape[1]))
    return base.Terms(
      loss=base.WeightedMean(total * rows, rows),
      report=jax.lax.stop_gradient(report),
    )

  def _weight(self, target: Target) -> float:
    """Factor of a target's loss; layers share the feature weight."""
    weight = self.teacher_weights.get(target.teacher, 1.0)
    if target.kind == SUMMARY:
      return weight * self.summary_weight
    layers = sum(
      t.teacher == target.teacher and t.kind != SUMMARY
      for t in self._resolved()
    )
    return weight * self.feature_weight / layers


def _pooled(spec: Any) -> tuple:
  return (jax.ShapeDtypeStruct((1, spec.image.embed_dim), jnp.float32),)


def _patches(spec: Any) -> tuple:
  return (jax.ShapeDtypeStruct((1, 1, spec.image.width), jnp.float32),)
