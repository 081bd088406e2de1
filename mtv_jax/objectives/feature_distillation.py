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
from jaxtyping import Array, Float, Int

from mtv_jax.augment import geometry
from mtv_jax.config import options
from mtv_jax.config.feature_layout import DTYPES, FeatureLayout, field_name
from mtv_jax.models import positions, standardization
from mtv_jax.models.heads.projection import Adaptor, unit
from mtv_jax.objectives import base
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
  losses = jnp.where(error < 1.0, 0.5 * jnp.square(error), error - 0.5)
  return jnp.mean(losses, axis=-1)


def per_example_mean(x: Float[Array, " b *n"]) -> Float[Array, " b"]:
  """Mean over all but the first axis."""
  return jnp.mean(x.reshape(len(x), -1), axis=1)


def assign_rows(valid: Float[Array, " b"], teachers: int) -> Int[Array, " b"]:
  """The teacher of each valid row, in near equal numbers.

  By a fixed permutation of the valid rows, since rows of one source may have
  the period of the teachers.
  """
  order = np.random.default_rng(0).permutation(len(valid)) % teachers
  return jnp.asarray(order)[jnp.cumsum(valid).astype(jnp.int32) - 1]


SUMMARY = "pooled"


@dataclasses.dataclass(frozen=True)
class Target:
  """Teacher features that the student predicts."""

  teacher: str
  kind: str  # 'pooled', 'patches' (after the final norm) or 'layerI'.
  channels: int
  encoding: base.Encoding
  grid: int  # Patches per side for the comparison.
  stored_grid: int  # Patches per side of the teacher.
  layer: int | None = None  # The block of 'layerI'.
  token: int | None = None  # The student's prefix token; None: pooled.
  prefix: int = 0  # Tokens before the patches of a layer.
  cached: str | None = None  # Format of the cached features, if any.
  is_cropped_or_flipped: bool = False  # Whether the view crops or flips.

  @property
  def name(self) -> str:
    """Name in heads and statistics."""
    return f"{self.teacher}_{self.kind}"

  @property
  def is_from_pooled(self) -> bool:
    """Whether the student's pooled vector predicts the target."""
    return self.kind == SUMMARY and self.token is None

  def read(self, encodings: base.Encodings, batch: base.Batch) -> Array:
    """Features of the view's crops: `[b, n, E]` or `[b, n, p, D]`."""
    if self.cached:
      return self._read_cached(batch)
    output = encodings[self.encoding]
    if self.kind == SUMMARY:
      return output.pooled
    if self.layer is None:
      return self.resize(output.patches)
    return self.resize(output.intermediates[self.layer][:, :, self.prefix :])

  def _read_cached(self, batch: base.Batch) -> Float[Array, "b n *p d"]:
    """Decodes cached features of the canvas; crops patches like depth maps."""
    codes = batch[field_name(self.teacher, self.kind)]  # [b, p, D]
    scale = batch[field_name(self.teacher, self.kind, "scale")]  # [b, p]
    values = jax.lax.bitcast_convert_type(codes, DTYPES[self.cached])
    x = values.astype(jnp.float32) * scale[..., None]
    view = batch["views"][self.encoding.view]
    b, count = view.flipped.shape
    if self.kind == SUMMARY:
      return jnp.broadcast_to(x, (b, count, x.shape[-1]))
    if self.is_cropped_or_flipped:
      return geometry.crop_features(x, view.box, view.flipped, size=self.grid)
    x = self.resize(x)
    return jnp.broadcast_to(x[:, None], (b, count, *x.shape[1:]))

  def read_student(self, output: Any) -> Array:
    """Student features, from an `ImageOutput`, that predict the target."""
    if self.is_from_pooled:
      return output.pooled
    if self.token is not None:
      return output.prefix[:, :, self.token]
    return self.resize(output.patches)

  def read_valid(self, batch: base.Batch, rows: int) -> Float[Array, " b"]:
    """1 for labelled rows; without a label set, 1 for all rows."""
    if self.cached:
      return batch[field_name(self.teacher, "valid")].astype(jnp.float32)
    return jnp.ones(rows)

  def resize(self, patches: Float[Array, "*b p d"]) -> Float[Array, "*b q d"]:
    """Resamples teacher or student patches to the comparison grid."""
    return positions.resize_patches(patches, self.grid**2, "antialiased")


def is_cropped(view: Any) -> bool:
  """Whether a view crops images."""
  return not all(isinstance(p.box_op, geometry.Resize) for p in view.pipelines)


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
  # Divides the rows of a batch among the teachers, see `assign_rows`. Teachers
  # still encode all rows.
  partition: bool = False
  # Factors of each teacher's losses, and of its pooled loss; default 1.
  teacher_weights: Mapping[str, options.NonNegativeFloat] = dataclasses.field(
    default_factory=dict
  )
  summary_weights: Mapping[str, options.NonNegativeFloat] = dataclasses.field(
    default_factory=dict
  )
  # Prefix tokens of the student (`ImageOutput.prefix`: CLS, if any, then
  # registers) that predict these teachers' pooled vectors; in AM-RADIO each
  # teacher has one. Default: the student's pooled vector.
  summary_tokens: Mapping[str, options.NonNegativeInt] = dataclasses.field(
    default_factory=dict
  )
  summary_weight: options.NonNegativeFloat = 1.0
  feature_weight: options.NonNegativeFloat = 1.0
  # 'none' compares features directly, which needs a teacher of equal width.
  adaptor: Literal["mlp", "none"] = "mlp"
  # Hidden units of an adaptor. None: the wider of the student and its teacher,
  # so that an added teacher leaves other adaptors as they are. AM-RADIO uses
  # the width of the widest teacher (section 3.2).
  hidden: options.PositiveInt | None = None
  adaptor_eps: options.PositiveFloat = 1e-6  # Norm epsilon; RADIO: 1e-5.
  # Patch distance: AM-RADIO's 0.9 cosine + 0.1 smooth L1 (Eq. 3), or the mean
  # square, with which PHI-S compares all standardisations (Eq. 1).
  feature_loss: Literal["cosine_smooth_l1", "mse"] = "cosine_smooth_l1"
  cosine_share: options.Fraction = 0.9  # The rest is smooth L1.
  # Standardisation of teacher patches, see `models/standardization.py`; 'none'
  # in AM-RADIO. Without adaptors it also applies to student patches.
  normalize: standardization.Standardization = "phi_s"
  # The same for teachers' pooled vectors, whose common mean hides differences.
  normalize_summary: standardization.Standardization = "none"
  # Training examples for estimating mean and covariance before step 0.
  statistics_examples: options.PositiveInt = 2048
  # Set by `resolve`.
  targets: tuple[Target, ...] | None = None
  width: options.PositiveInt | None = None  # The student's width.

  def __post_init__(self):
    if not self.summary_weight and not self.feature_weight:
      raise ConfigError("summary_weight and feature_weight are both 0.")

  def resolve(self, spec, views, teachers=base.NO_TEACHERS):
    where = "feature_distillation"
    base.check_visible(where, self.view, views, True)
    names = self.teachers
    if names is None:
      names = tuple(n for n, t in teachers.items() if not t.snapshot)
    if not names:
      raise ConfigError(f"{where}: config.teachers names no encoder.")
    summaries = {*self.summary_weights, *self.summary_tokens}
    if summaries and not self.summary_weight:
      raise ConfigError(
        f"{where}: summary_weight=0, but {sorted(summaries)} is set."
      )
    for key, available, requested in (
      ("teachers", teachers, {*names, *self.teacher_weights, *summaries}),
      ("views", views, {self.view}),
    ):
      if unknown := sorted(requested - {*available}):
        raise ConfigError(
          f"{where}: config.{key} lacks {unknown}; it has {sorted(available)}."
        )
    num_prefix = spec.image.prefix
    if any(i >= num_prefix for i in self.summary_tokens.values()):
      raise ConfigError(
        f"feature_distillation.summary_tokens={dict(self.summary_tokens)}: the "
        f"student has {num_prefix} prefix tokens; set model.registers."
      )
    targets = []
    for name in names:
      self._check_normalize(name, teachers[name])
      targets += self._targets_of(name, teachers[name], spec, views[self.view])
    return dataclasses.replace(
      self, teachers=names, targets=tuple(targets), width=spec.image.width
    )

  def _check_normalize(self, name: str, teacher: Any) -> None:
    image = teacher.model.image
    methods = {}  # (method, channels) by option.
    if self.feature_weight:
      methods["normalize"] = self.normalize, image.width
    if self.summary_weight:
      methods["normalize_summary"] = self.normalize_summary, image.embed_dim
    if all(method == "none" for method, _ in methods.values()):
      return
    if teacher.copies:
      raise ConfigError(
        f"feature_distillation: the teacher {name!r} is copied from the EMA "
        "teacher later, but its statistics are estimated at the start: set "
        f"{' and '.join(methods)} to 'none'."
      )
    for option, (method, width) in methods.items():
      if method != "phi_s":
        continue
      try:
        standardization.hadamard(width)
      except InputError as error:
        raise ConfigError(
          f"feature_distillation: {option}='phi_s' of teacher {name!r} with "
          f"{width} channels: {error}. Set 'whiten' or 'standardize'."
        ) from None

  def _targets_of(
    self, name: str, teacher: Any, spec: Any, view: Any
  ) -> list[Target]:
    student, image = spec.image, teacher.model.image
    if teacher.cached and is_cropped(view) and self.summary_weight:
      raise ConfigError(
        f"feature_distillation: label sets of {name!r} hold pooled features of "
        f"whole images: name a view without crops, or set summary_weight=0."
      )
    size = teacher.size or teacher.input_size or image.image_size
    try:
      stored_grid = image.grid_of(size, size)[0]
    except InputError as error:
      raise ConfigError(f"config.teachers.{name}.size: {error}") from None
    # 0 means the view itself: student and teacher then see equal pixels.
    view_size = 0 if size == view.size else size
    is_flipped = any(p.flip for p in view.pipelines)
    fields = dict(
      teacher=name,
      encoding=base.Encoding("image", view.name, name, view_size),
      grid=min(stored_grid, view.size // student.patch_size),
      stored_grid=stored_grid,
      cached=teacher.cached,
      is_cropped_or_flipped=is_cropped(view) or is_flipped,
    )
    targets = []
    if self.summary_weight:
      token = self.summary_tokens.get(name)
      targets.append(
        Target(kind=SUMMARY, channels=image.embed_dim, token=token, **fields)
      )
    fields |= dict(channels=image.width)
    if self.feature_weight and not teacher.layers:
      targets.append(Target(kind="patches", **fields))
    if self.feature_weight:
      targets += [
        Target(kind=f"layer{i}", layer=i, prefix=image.prefix, **fields)
        for i in teacher.layers
      ]
    for target in targets if self.adaptor == "none" else ():
      channels = student.embed_dim if target.is_from_pooled else student.width
      if channels != target.channels:
        raise ConfigError(
          f"feature_distillation: {channels} channels can't be compared with "
          f"the {target.channels} of the teacher {name!r}: set adaptor='mlp'."
        )
    return targets

  def _get_targets(self) -> tuple[Target, ...]:
    if self.targets is None:
      raise ConfigError(
        "feature_distillation: targets are not set; call resolve() first."
      )
    return self.targets

  def needs(self) -> base.Needs:
    layers: dict[base.Encoding, set[int]] = {self.image: set()}
    layouts: dict[str, FeatureLayout] = {}
    for target in self._get_targets():
      if target.cached:
        empty_layout = FeatureLayout(target.cached, {})
        layout = layouts.setdefault(target.teacher, empty_layout)
        count = 1 if target.kind == SUMMARY else target.stored_grid**2
        layout.shapes[target.kind] = (count, target.channels)
        continue
      indices = layers.setdefault(target.encoding, set())
      if target.layer is not None:
        indices.add(target.layer)
    encodings = {e: tuple(sorted(t)) for e, t in layers.items()}
    fields = () if self.sources is None else ("source",)
    return base.Needs(encodings, fields, features=layouts)

  def heads(self) -> dict[str, base.Head]:
    heads = {}
    for target in self._get_targets() if self.adaptor != "none" else ():
      hidden = self.hidden or max(self.width or 0, target.channels)
      example = _example_pooled if target.is_from_pooled else _example_patches
      module = Adaptor(target.channels, hidden, self.adaptor_eps)
      heads[f"adaptor_{target.name}"] = base.Head(module, example)
    return heads

  @property
  def num_statistics_examples(self) -> int:
    return self.statistics_examples if self._standardized_targets() else 0

  def _standardized_targets(self) -> dict[str, Target]:
    return {
      target.name: target
      for target in self._get_targets()
      if self._method_of(target.kind) != "none"
    }

  def _method_of(self, kind: str) -> standardization.Standardization:
    return self.normalize_summary if kind == SUMMARY else self.normalize

  def initial_statistics(self) -> dict[str, jax.Array]:
    statistics = {}
    for name, target in self._standardized_targets().items():
      statistics[f"{name}_mean"] = jnp.zeros(target.channels)
      statistics[f"{name}_matrix"] = jnp.eye(target.channels)
    return statistics

  def statistics_features(self, encodings, batch):
    features = {}
    for name, target in self._standardized_targets().items():
      x = target.read(encodings, batch)  # [b, n, p, d] or [b, n, e]
      valid = self._read_valid(target, batch, len(x))
      valid = valid.reshape(-1, *(1,) * (x.ndim - 2))
      features[name] = x, jnp.broadcast_to(valid, x.shape[:-1])
    return features

  def _read_valid(self, target, batch, rows) -> Float[Array, " b"]:
    """1 for rows in the loss, see `Target.read_valid`."""
    valid = target.read_valid(batch, rows)
    if self.sources is not None:
      valid *= jnp.isin(batch["source"], jnp.asarray(self.sources))
    return valid

  def fit_statistics(self, moments) -> dict[str, np.ndarray]:
    statistics, targets = {}, self._standardized_targets()
    for name, values in moments.items():
      method = self._method_of(targets[name].kind)
      mean, matrix = standardization.fit_standardization(values, method)
      statistics[f"{name}_mean"] = mean.astype(np.float32)
      statistics[f"{name}_matrix"] = matrix.astype(np.float32)
    return statistics

  def loss_inputs(self, encodings, heads, batch) -> LossInputs:
    student, statistics = encodings[self.image], batch["statistics"]
    standardized = self._standardized_targets()
    losses, cosines, valid = {}, {}, {}
    for target in self._get_targets():
      expected = target.read(encodings, batch).astype(jnp.float32)
      valid[target.name] = self._read_valid(target, batch, len(expected))
      predicted = target.read_student(student)  # [b, n, E] or [b, n, p, D]
      if target.name in standardized:
        mean = statistics[f"{target.name}_mean"]
        matrix = statistics[f"{target.name}_matrix"]
        expected = standardization.standardize(expected, mean, matrix)
        if self.adaptor == "none":
          predicted = standardization.standardize(predicted, mean, matrix)
      if self.adaptor != "none":
        predicted = heads[f"adaptor_{target.name}"](predicted)
      distances = cosine_distance(predicted, expected)  # [b, n] or [b, n, p]
      cosines[target.name] = 1.0 - per_example_mean(distances)
      if target.kind != SUMMARY:
        distances = self._feature_distance(distances, predicted, expected)
      losses[target.name] = per_example_mean(distances) * valid[target.name]
    diagnostics = jax.lax.stop_gradient((cosines, valid))
    return LossInputs(losses, *diagnostics)

  def _feature_distance(self, cosine, x, y) -> Float[Array, "b n p"]:
    if self.feature_loss == "mse":
      return jnp.mean(jnp.square(x - y), axis=-1)
    share = self.cosine_share
    return share * cosine + (1.0 - share) * smooth_l1(x, y)

  def loss(self, loss_inputs, heads, context) -> base.Terms:
    total, report, masks = jnp.zeros(()), {}, []
    targets = self._get_targets()
    names = [*dict.fromkeys(t.teacher for t in targets)]
    for target in targets:
      valid = loss_inputs.valid[target.name]
      if self.partition:  # Here, where `accumulate` has joined the whole batch.
        teacher = names.index(target.teacher)
        valid *= assign_rows(valid, len(names)) == teacher
      masks.append(valid)
      losses = loss_inputs.losses[target.name]
      mean = base.WeightedMean(jnp.sum(losses * valid), jnp.sum(valid))
      total += self._weight(target) * mean.value()
      report[f"{target.name}_loss"] = mean
      cosine = jnp.sum(loss_inputs.cosines[target.name] * valid)
      report[f"{target.name}_cosine"] = base.WeightedMean(cosine, mean.count)
    rows = jnp.sum(jnp.max(jnp.stack(masks), axis=0))  # Of any teacher.
    report["labelled"] = base.WeightedMean(rows, jnp.float32(len(masks[0])))
    return base.Terms(
      loss=base.WeightedMean(total * rows, rows),
      report=jax.lax.stop_gradient(report),
    )

  def _weight(self, target: Target) -> float:
    """Factor of a target's loss; layers share the feature weight."""
    factor = self.teacher_weights.get(target.teacher, 1.0)
    if target.kind == SUMMARY:
      summary_factor = self.summary_weights.get(target.teacher, 1.0)
      return factor * summary_factor * self.summary_weight
    targets = [t for t in self._get_targets() if t.teacher == target.teacher]
    num_features = sum(t.kind != SUMMARY for t in targets)
    return factor * self.feature_weight / num_features


def _example_pooled(spec: Any) -> tuple:
  return (jax.ShapeDtypeStruct((1, spec.image.embed_dim), "float32"),)


def _example_patches(spec: Any) -> tuple:
  return (jax.ShapeDtypeStruct((1, 1, spec.image.width), "float32"),)
