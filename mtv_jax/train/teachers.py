"""Frozen teachers, `config.teachers`: architecture, pixels, snapshots."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtv_jax.checkpoint.reading import saved_steps
from mtv_jax.config import sections
from mtv_jax.config.durations import Duration, RunLength
from mtv_jax.config.feature_layout import Format
from mtv_jax.config.options import PositiveInt
from mtv_jax.models import two_tower as model_lib
from mtv_jax.objectives import base
from mtv_jax.train.param_source import open_param_source
from mtv_jax.train.workdir import read_recorded_config
from mtv_jax.utils.errors import ConfigError, InputError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
  """An entry of `config.teachers`: an image encoder that objectives read.

  Loaded from a path, or a copy of the EMA teacher, see `FrozenTeacher`.
  """

  path: str | None = None
  step: int | None = None
  # None: `config.weights` of the source run.
  weights: Literal["student", "teacher", "ema"] | None = None
  update_every: Duration | None = None
  max_updates: PositiveInt | None = None
  # Input pixels per side. None: the view's size, or in `feature_distillation`
  # the teacher's own.
  size: PositiveInt | None = None
  # Blocks whose patch tokens `feature_distillation` learns; -1 is the last.
  # None: the final tokens, after the norm.
  layers: tuple[int, ...] | None = None
  # Format of label sets with its features; the teacher is then not run.
  cached: Format | None = None
  # Read from the path. None: the student's.
  model: Mapping[str, Any] | None = None
  image_mean: model_lib.Channels | None = None
  image_std: model_lib.Channels | None = None
  # Pixels per side of its preprocessing. None: the model's.
  input_size: PositiveInt | None = None


def read_teacher_models(
  teachers: Mapping[str, TeacherConfig],
  workdir: str | os.PathLike | None = None,
) -> dict[str, TeacherConfig]:
  """Fills in architectures and pixel statistics of teachers with a path.

  A resumed run does not read the teachers' folders: its config records these
  values, and its checkpoints have the parameters.
  """
  configs = {}
  if teachers and workdir is not None and saved_steps(workdir):
    configs = read_recorded_config(workdir).get("teachers") or {}
  return {
    n: _read_teacher_model(t, configs.get(n) or {}) for n, t in teachers.items()
  }


def _read_teacher_model(
  teacher: TeacherConfig, recorded: Mapping[str, Any]
) -> TeacherConfig:
  # A refreshed teacher has the student's architecture.
  is_refreshed = teacher.update_every is not None and teacher.update_every.value
  if teacher.path is None or teacher.model is not None or is_refreshed:
    return teacher
  source = ("path", "weights", "step")
  is_same = all(recorded.get(key) == getattr(teacher, key) for key in source)
  if is_same and recorded.get("model"):
    # Older configs lack some keys; their teachers saw the run's pixels.
    keys = ("model", "image_mean", "image_std", "input_size")
    values = sections.to_dict(teacher) | {k: recorded.get(k) for k in keys}
    return sections.read(TeacherConfig, values, "config.teachers")
  path, param_source = teacher.path, open_param_source()
  param_source.check_source(path, weights=teacher.weights, step=teacher.step)
  model_info = param_source.read_model_info(path)
  pixels = model_info.preprocess
  return dataclasses.replace(
    teacher,
    model=sections.to_dict(model_info.spec.to_dict()["image"]),
    image_mean=pixels.mean,
    image_std=pixels.std,
    input_size=pixels.size,
  )


@dataclasses.dataclass(frozen=True)
class PixelMap:
  """Maps pixels from one normalisation to another, per channel."""

  scale: tuple[float, ...]  # Old std / new std.
  offset: tuple[float, ...]  # (old mean - new mean) / new std.

  @classmethod
  def between(cls, ours: Any, theirs: Any) -> PixelMap | None:
    """From (mean, std) `ours` to `theirs`; None if they are equal."""
    if ours == theirs:
      return None
    (mean, std), (new_mean, new_std) = map(np.float64, (ours, theirs))
    offset = (mean - new_mean) / new_std
    return cls(tuple((std / new_std).tolist()), tuple(offset.tolist()))

  def __call__(self, images: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """Renormalises images; computes in float32."""
    scale, offset = np.float32(self.scale), np.float32(self.offset)
    return (images.astype(jnp.float32) * scale + offset).astype(images.dtype)


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
  """A frozen image encoder, or a snapshot of the EMA teacher.

  A snapshot is copied before the first update that reads it. With
  `update_every`, it is refreshed at that interval, at most `max_updates`
  times, like DINOv3's Gram teacher (arXiv 2508.10104, section 4.2).
  """

  model: model_lib.ModelSpec
  snapshot: bool = False  # Whether it starts as a copy of the EMA teacher.
  update_every: int | None = None  # 0 until `select_teachers` sets it.
  max_updates: int | None = None
  # Input pixels per side. None: the objective's choice.
  size: int | None = None
  input_size: int | None = None  # Preprocessing size. None: the model's.
  layers: tuple[int, ...] = ()  # Blocks whose tokens are distilled, from 0.
  pixels: PixelMap | None = None  # From the views' pixels to the teacher's.
  cached: str | None = None  # Format of label sets that replace it.

  @property
  def copies(self) -> bool:
    return self.snapshot or self.update_every is not None

  def due(self, since: int) -> bool:
    """Whether to copy it `since` updates after the first read."""
    if since <= 0 or not self.update_every:
      return since == 0 and self.snapshot
    count, rest = divmod(since, self.update_every)
    return rest == 0 and (self.max_updates is None or count <= self.max_updates)


def build_teachers(
  configs: Mapping[str, TeacherConfig], model: model_lib.ModelConfig
) -> dict[str, FrozenTeacher]:
  """Builds all teachers of a config, including unused teachers."""
  teachers = {}
  for name, entry in configs.items():
    where = f"config.teachers.{name}"
    if name in (base.STUDENT, base.TEACHER):
      raise ConfigError(f"{where}: the name is reserved; choose another.")
    if entry.cached and entry.path is None and entry.model is None:
      raise ConfigError(
        f"{where}.cached: the shapes of its features are unknown. Set the "
        "path of the encoder, or its model."
      )
    spec = _read_spec(entry, model)
    if entry.size is not None:
      try:
        spec.image.grid_of(entry.size, entry.size)
      except InputError as error:
        raise ConfigError(f"{where}.size: {error}") from None
    ours = theirs = model.pixels
    mean, std = entry.image_mean, entry.image_std
    if mean is not None or std is not None:
      theirs = model_lib.pixel_statistics(
        0.5 if mean is None else mean, 0.5 if std is None else std
      )
    teachers[name] = FrozenTeacher(
      model=spec,
      snapshot=entry.path is None and not entry.cached,
      update_every=None if entry.update_every is None else 0,
      max_updates=entry.max_updates,
      size=entry.size,
      input_size=entry.input_size,
      layers=_check_layers(where, entry.layers or (), spec.image.depth),
      pixels=PixelMap.between(ours, theirs),
      cached=entry.cached,
    )
  return teachers


def _read_spec(
  entry: TeacherConfig, student: model_lib.ModelConfig
) -> model_lib.ModelSpec:
  """Reads an architecture from `ModelSpec.to_dict` or a config's model."""
  fields = entry.model
  if fields is None:
    return model_lib.ModelSpec(image=student.spec.image)
  if "variant" in fields:
    return model_lib.ModelSpec.from_config({**fields, "text": None})
  return model_lib.ModelSpec.from_dict({"image": fields})


def _check_layers(
  where: str, layers: tuple[int, ...], depth: int
) -> tuple[int, ...]:
  """Returns sorted block indices, counted from 0."""
  for layer in layers:
    if not -depth <= layer < depth:
      raise ConfigError(
        f"{where}.layers: {layer} is outside an encoder with {depth} blocks; "
        f"expected 0..{depth - 1}, or -{depth}..-1 from the end."
      )
  return tuple(sorted({layer % depth for layer in layers}))


def select_teachers(
  configs: Mapping[str, TeacherConfig],
  teachers: Mapping[str, FrozenTeacher],
  model: model_lib.ModelSpec,
  first_read_steps: Mapping[str, int],
  length: RunLength,
) -> dict[str, FrozenTeacher]:
  """Selects the teachers in `first_read_steps`, which objectives read."""
  selected = {}
  for name, teacher in teachers.items():
    where = f"config.teachers.{name}"
    if name not in first_read_steps:
      if not teacher.cached:
        log.warning("No objective reads %s: it is not loaded.", where)
      continue
    if teacher.copies and base.TEACHER not in first_read_steps:
      raise ConfigError(
        f"{where} is copied from the EMA teacher, which no objective reads. "
        "Set a path without update_every, or add a self-distillation objective."
      )
    every = length.steps(configs[name].update_every)
    teacher = dataclasses.replace(teacher, update_every=every)
    copy_step = first_read_steps[name] + (0 if teacher.snapshot else every or 0)
    if teacher.copies and copy_step < first_read_steps[base.TEACHER]:
      raise ConfigError(
        f"{where} is copied from the EMA teacher at step {copy_step}, which "
        f"starts at step {first_read_steps[base.TEACHER]}. Start the objective "
        f"that reads {name} later, or self-distillation earlier."
      )
    if teacher.copies and teacher.model.image != model.image:
      raise ConfigError(
        f"{where} is copied from the EMA teacher and must have the student's "
        "architecture: leave its `model` out."
      )
    selected[name] = teacher
  return selected
