"""Frozen teachers' features, the targets of `feature_distillation`.

Computed in the step from a teacher's encoding, or read from 8-bit label sets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtv_jax.augment import geometry
from mtv_jax.augment.geometry import Resize
from mtv_jax.config.feature_layout import DTYPES, Format, field_name
from mtv_jax.models import positions
from mtv_jax.objectives import base
from mtv_jax.utils.errors import ConfigError, InputError

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
  tap: int | None = None  # The block of 'layerI'.
  prefix: int = 0  # Tokens before the patches in the taps.
  cached: Format | None = None  # Format of the label set, if any.
  is_cropped_or_flipped: bool = False  # Whether the view crops or flips.

  @property
  def name(self) -> str:
    """Name in heads and statistics."""
    return f"{self.teacher}_{self.kind}"

  @property
  def num_vectors(self) -> int:
    """Vectors per image in a label set."""
    return 1 if self.kind == SUMMARY else self.stored_grid**2

  def read(self, encodings: base.Encodings, batch: base.Batch) -> Array:
    """Features of the view's crops: `[b, n, E]` or `[b, n, p, D]`."""
    if self.cached:
      return self._read_cached(batch)
    output = encodings[self.encoding]
    if self.kind == SUMMARY:
      return output.pooled
    if self.tap is None:
      return self.resize(output.patches)
    return self.resize(output.taps[self.tap][:, :, self.prefix :])

  def _read_cached(self, batch: base.Batch) -> Float[Array, "b n *p d"]:
    """Decodes the canvas's features; crops patches like depth maps."""
    codes = batch[field_name(self.teacher, self.kind)]  # [b, p, D]
    scale = batch[field_name(self.teacher, self.kind, "scale")]  # [b, p]
    numbers = jax.lax.bitcast_convert_type(codes, DTYPES[self.cached])
    x = numbers.astype(jnp.float32) * scale[..., None]
    view = batch["views"][self.encoding.view]
    b, count = view.flipped.shape
    if self.kind == SUMMARY:
      return jnp.broadcast_to(x, (b, count, x.shape[-1]))
    if self.is_cropped_or_flipped:
      return geometry.crop_features(x, view.box, view.flipped, size=self.grid)
    x = self.resize(x)
    return jnp.broadcast_to(x[:, None], (b, count, *x.shape[1:]))

  def read_valid(self, batch: base.Batch, rows: int) -> Float[Array, " b"]:
    """1 for labelled rows; 1 for all rows without a label set."""
    if self.cached:
      return batch[field_name(self.teacher, "valid")].astype(jnp.float32)
    return jnp.ones(rows)

  def resize(self, patches: Float[Array, "*b p d"]) -> Float[Array, "*b q d"]:
    """Resamples teacher or student patches to the comparison grid."""
    return positions.resize_patches(patches, self.grid**2, "antialiased")


def is_cropped(view: Any) -> bool:
  """Whether a view crops images."""
  return not all(isinstance(p.box_op, Resize) for p in view.pipelines)


def make_targets(
  name: str,
  teacher: Any,
  student: Any,
  view: Any,
  *,
  summary: bool,
  features: bool,
) -> list[Target]:
  """Builds the targets of one teacher.

  Args:
    name: the teacher's name.
    teacher: a `train.teachers.FrozenTeacher`.
    student: the student's `models.vit.ViTSpec`.
    view: the student's `views.View`; the teacher sees its crops.
    summary: whether to include pooled features.
    features: whether to include patches, for each of the teacher's layers.

  Raises:
    ConfigError: if the teacher's patch size does not divide its input size.
  """
  image = teacher.model.image
  size = teacher.size or teacher.input_size or image.image_size
  try:
    stored_grid = image.grid_of(size, size)[0]
  except InputError as error:
    raise ConfigError(f"config.teachers.{name}.size: {error}") from None
  common = dict(
    teacher=name,
    # The view itself if sizes agree, so that both see equal pixels.
    encoding=base.Encoding(
      "image", view.name, name, 0 if size == view.size else size
    ),
    grid=min(stored_grid, view.size // student.patch_size),
    stored_grid=stored_grid,
    cached=teacher.cached,
    is_cropped_or_flipped=(
      is_cropped(view) or any(p.flip for p in view.pipelines)
    ),
  )
  targets = []
  if summary:
    targets.append(Target(kind=SUMMARY, channels=image.embed_dim, **common))
  common |= dict(channels=image.width)
  if features and not teacher.layers:
    targets.append(Target(kind="patches", **common))
  if features:
    targets += [
      Target(kind=f"layer{i}", tap=i, prefix=image.prefix, **common)
      for i in teacher.layers
    ]
  return targets
