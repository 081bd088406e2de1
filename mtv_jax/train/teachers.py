"""Frozen teachers of `config.teachers`: architecture, pixels, snapshots."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mtv_jax.config import schema
from mtv_jax.models import two_tower as model_lib
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError, InputError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PixelMap:
  """The map of pixels from one mean and deviation of channels to others.

  Attributes:
    scale: of each channel, the old deviation over the new one.
    offset: of each channel, in units of the new deviation.
  """

  scale: tuple[float, ...]
  offset: tuple[float, ...]

  @classmethod
  def between(cls, ours: Any, theirs: Any) -> PixelMap | None:
    """From pixels of (mean, std) `ours` to `theirs`; None if they are equal."""
    if ours == theirs:
      return None
    (mean, std), (new_mean, new_std) = map(np.float64, (ours, theirs))
    offset = (mean - new_mean) / new_std
    return cls(tuple((std / new_std).tolist()), tuple(offset.tolist()))

  def __call__(self, images: Float[Array, "*b 3"]) -> Float[Array, "*b 3"]:
    """The same images in the other normalisation; computes in float32."""
    scale, offset = np.float32(self.scale), np.float32(self.offset)
    return (images.astype(jnp.float32) * scale + offset).astype(images.dtype)


@dataclasses.dataclass(frozen=True)
class FrozenTeacher:
  """A frozen image encoder, or a snapshot of the EMA teacher.

  A snapshot is copied before the first update that reads it. With
  `update_every` it is copied again after as many updates, `max_updates` times
  at most, as DINOv3's Gram teacher (arXiv 2508.10104, section 4.2).
  """

  model: model_lib.ModelSpec
  snapshot: bool = False  # Whether it starts as a copy of the EMA teacher.
  update_every: int | None = None
  max_updates: int | None = None
  # Pixels per side that it sees. None: the objective's choice.
  size: int | None = None
  input_size: int | None = None  # Of its preprocessing; None: its model's.
  layers: tuple[int, ...] = ()  # Blocks whose tokens are distilled, from 0.
  pixels: PixelMap | None = None  # From the views' pixels to its own.
  cached: str | None = None  # Format of its label sets, if they replace it.

  @property
  def copies(self) -> bool:
    """Whether it is ever copied from the EMA teacher."""
    return self.snapshot or self.update_every is not None

  def due(self, since: int) -> bool:
    """Whether to copy it `since` updates after the first that reads it."""
    if since <= 0 or not self.update_every:
      return since == 0 and self.snapshot
    count, rest = divmod(since, self.update_every)
    return rest == 0 and (self.max_updates is None or count <= self.max_updates)


def build_teachers(
  config: ConfigDict, model: model_lib.ModelSpec, length: schema.RunLength
) -> dict[str, FrozenTeacher]:
  """All teachers of a resolved config, whether objectives read them or not.

  Raises:
    ConfigError: for a name that is taken, or a size or layers that the teacher
      can't have.
  """
  teachers = {}
  ours = schema.pixel_statistics(config.model)
  for name, entry in config.teachers.items():
    where = f"config.teachers.{name}"
    if name in (base.STUDENT, base.TEACHER):
      raise ConfigError(f"{where}: the name is taken; choose another.")
    if entry.cached and entry.path is None and entry.model is None:
      raise ConfigError(
        f"{where}.cached: the shapes of its features are not known. Give the "
        "path of the encoder, or its model."
      )
    spec = model_lib.ModelSpec(image=model.image)
    if entry.model is not None:
      spec = _read_spec(entry.model.to_dict())
    fields = {k: v for k, v in entry.items() if v is not None}
    has_statistics = not fields.keys().isdisjoint(("image_mean", "image_std"))
    theirs = schema.pixel_statistics(fields) if has_statistics else ours
    teachers[name] = FrozenTeacher(
      model=spec,
      snapshot=entry.path is None and not entry.cached,
      update_every=length.steps("update_every", entry, default=None),
      max_updates=entry.max_updates,
      size=_check_size(where, entry.size, spec),
      input_size=entry.input_size,
      layers=_check_layers(where, entry.layers or (), spec.image.depth),
      pixels=PixelMap.between(ours, theirs),
      cached=entry.cached,
    )
  return teachers


def _read_spec(fields: dict[str, Any]) -> model_lib.ModelSpec:
  """The architecture, by its fields or by those of a config's `model`."""
  if "variant" in fields:
    return model_lib.ModelSpec.from_config({**fields, "text": None})
  return model_lib.ModelSpec.from_dict({"image": fields})


def _check_size(
  where: str, size: int | None, spec: model_lib.ModelSpec
) -> int | None:
  if size is not None:
    try:
      spec.image.grid_of(size, size)
    except InputError as error:
      raise ConfigError(f"{where}.size: {error}") from None
  return size


def _check_layers(
  where: str, layers: tuple[int, ...], depth: int
) -> tuple[int, ...]:
  """Blocks counted from 0."""
  for layer in layers:
    if not -depth <= layer < depth:
      raise ConfigError(
        f"{where}.layers: {layer} of an encoder with {depth} blocks; expected "
        f"0..{depth - 1}, or -{depth}..-1 from the end."
      )
  return tuple(sorted({layer % depth for layer in layers}))


def select_teachers(
  teachers: Mapping[str, FrozenTeacher],
  model: model_lib.ModelSpec,
  first_reads: Mapping[str, int],
) -> dict[str, FrozenTeacher]:
  """The teachers that objectives read, first at the steps `first_reads`.

  Raises:
    ConfigError: one is copied from an EMA teacher that does not exist yet, or
      has another architecture.
  """
  selected = {}
  for name, teacher in teachers.items():
    where = f"config.teachers.{name}"
    if teacher.cached and name not in first_reads:
      continue
    if name not in first_reads:
      log.warning("No objective reads %s: it is not loaded.", where)
      continue
    if teacher.copies and base.TEACHER not in first_reads:
      raise ConfigError(
        f"{where} is copied from the EMA teacher, which no objective reads. "
        "Give a path without update_every, or add a self-distillation."
      )
    copied = first_reads[name]
    if not teacher.snapshot:
      copied += teacher.update_every or 0
    if teacher.copies and copied < first_reads[base.TEACHER]:
      raise ConfigError(
        f"{where} is copied from the EMA teacher at step {copied}, which "
        f"starts at step {first_reads[base.TEACHER]}. Start the objective that "
        f"reads {name} later, or self-distillation earlier."
      )
    if teacher.copies and teacher.model.image != model.image:
      raise ConfigError(
        f"{where} is copied from the EMA teacher and must have the student's "
        "architecture: leave its `model` out."
      )
    selected[name] = teacher
  return selected
