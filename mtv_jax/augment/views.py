"""Views of a canvas, computed on the device inside the train step.

A view is a named transform of the stored canvas, written as an op string
(`mtv_jax.config.op_strings`) with the ops of `OPS`, in this order:

  resize(S) | crop(S, min_area, max_area)   exactly one: the view's box
  flip(p)                                   horizontal mirroring
  jitter, grey, blur, solarize              photometrics, in the order written
  blocks(min, max, p) | keep(ratio)         masked or visible patches

`geometry.crop_maps` and `geometry.crop_boxes` transform the labels. Values are
in [-1, 1] by default (`x / 127.5 - 1`, as in SigLIP and big_vision);
`config.model.image_mean` and `image_std` set the normalisation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mtv_jax.augment import geometry
from mtv_jax.augment.masks import (
  MaskOp,
  max_masked_images,
  sample_masked_images,
)
from mtv_jax.augment.op import OPS, STAGES
from mtv_jax.augment.photometrics import PhotometricOp
from mtv_jax.config import options
from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.config.options import Range
from mtv_jax.utils.errors import ConfigError, InputError

_MAX_CROPS = 1000  # Each crop of a view is traced by itself.


@flax.struct.dataclass
class ViewBatch:
  """A view of every row of a batch; `n` is the view's `count`.

  Fields are untyped: JAX transforms rebuild it with shapes and shardings.
  """

  images: Any  # [b, n, size, size, 3], normalised, in the compute dtype.
  box: Any  # float32 [b, n, 4], (y0, x0, y1, x1) in the canvas's unit square.
  flipped: Any  # bool [b, n], whether the crop is mirrored.
  mask: Any = None  # bool [b, n, patches], True where `blocks` masks a patch.
  keep: Any = None  # int32 [b, n, visible], ascending, sampled by `keep`.


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The ops of one image of a view: a function of one canvas and one key."""

  box_op: geometry.BoxOp
  flip: geometry.Flip | None = None
  photometrics: tuple[PhotometricOp, ...] = ()
  mask: MaskOp | None = None
  # Normalisation of channels in 0..1; the defaults give [-1, 1].
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  # Uniform numbers for box, flip, photometrics and mask.
  num_uniforms: tuple[int, ...] = dataclasses.field(init=False)

  def __post_init__(self):
    ops = (self.box_op, self.flip, *self.photometrics, self.mask)
    counts = tuple(op.num_uniforms(self.size) if op else 0 for op in ops)
    object.__setattr__(self, "num_uniforms", counts)

  @property
  def size(self) -> int:
    """Pixels per side."""
    return self.box_op.size

  @property
  def mask_probability(self) -> float:
    """The probability that the image has masked patches."""
    has_blocks = self.mask is not None and self.mask.field == "mask"
    return float(self.mask.p) if has_blocks else 0.0

  def __call__(
    self,
    planes: Float[Array, "3 s s"],
    image_size: Int[Array, "2"],
    key: Key[Array, ""],
    masked: Bool[Array, ""] | None,
  ) -> ViewBatch:
    """Computes the image, as a `ViewBatch` without its two batch dimensions.

    `planes`: canvas minus 127.5, in the compute dtype. `masked`: whether
    `blocks` masks the image; None without masks.
    """
    size = self.box_op.size
    # Ops with p=0 also consume their numbers: other ops' don't shift.
    u = jax.random.uniform(key, (sum(self.num_uniforms),))
    ends = np.cumsum(self.num_uniforms)[:-1].tolist()
    box_u, flip_u, *photometric_u, mask_u = jnp.split(u, ends)
    box = self.box_op.box(image_size, box_u)
    flipped = jnp.zeros((), bool)
    if self.flip is not None:
      flipped = self.flip.sample_flip(flip_u)
    if isinstance(self.box_op, geometry.Resize) and planes.shape[1] == size:
      image = jnp.where(flipped, planes[..., ::-1], planes)
      image = image.astype(jnp.float32)  # [3, size, size]
    else:
      method = self.box_op.method
      image = geometry.resample(planes, box, flipped, size=size, method=method)
      if method == "bicubic":  # Bicubic overshoots.
        image = jnp.clip(image, -127.5, 127.5)
    if self.photometrics:
      image = tuple(jnp.clip(image / 255.0 + 0.5, 0.0, 1.0))
      for op, u in zip(self.photometrics, photometric_u, strict=True):
        if op.p > 0:
          image = op(image, u, planes.dtype)
      image = 2.0 * jnp.stack(image) - 1.0
    else:
      image = image / 127.5
    image = jnp.moveaxis(image, 0, -1)  # [size, size, 3], in [-1, 1]
    if {*self.mean, *self.std} != {0.5}:
      mean, std = np.asarray(self.mean), np.asarray(self.std)
      image = image * np.float32(0.5 / std) + np.float32((0.5 - mean) / std)
    patches = {}
    if self.mask is not None:
      patches[self.mask.field] = self.mask(mask_u, masked, size=size)
    return ViewBatch(image.astype(planes.dtype), box, flipped, **patches)


@dataclasses.dataclass(frozen=True)
class View:
  """A named view: `count` images of a canvas, each with its own pipeline."""

  name: str
  pipelines: tuple[Pipeline, ...]  # Equal pipelines run as one vmap.
  # View whose random numbers this view repeats, for equal boxes and flips.
  crops_of: str | None = None

  @property
  def count(self) -> int:
    """Images per canvas."""
    return len(self.pipelines)

  @property
  def size(self) -> int:
    """Pixels per side."""
    return self.pipelines[0].size

  @property
  def patch(self) -> int | None:
    """Patch size of the masks; None without masks."""
    mask = self.pipelines[0].mask
    return None if mask is None else mask.patch

  @property
  def max_masked(self) -> int:
    """Maximum patches that `blocks` masks per row; 0 without `blocks`.

    With a probability of 0, the maximum for one image.
    """
    masks = [p.mask for p in self.pipelines if p.mask is not None]
    counts = sorted(m.count(self.size) for m in masks if m.field == "mask")
    return sum(counts[-max(max_masked_images(self._mask_probabilities), 1) :])

  @functools.cached_property
  def _mask_probabilities(self) -> tuple[float, ...]:
    return tuple(p.mask_probability for p in self.pipelines)

  def __call__(
    self,
    canvas: UInt8[Array, "b s s 3"],
    image_size: Int[Array, "b 2"],
    keys: Key[Array, " b"],
    dtype: Any,
  ) -> ViewBatch:
    """Computes the view; a row depends only on its canvas, size and key.

    `image_size` is the height and width of the original images, which are
    squashed to squares; `keys` come from `row_keys`; `dtype` is the dtype of
    resampling and images.
    """
    shape = canvas.shape
    if canvas.dtype != jnp.uint8 or shape[1:] != (shape[1], shape[1], 3):
      raise InputError(
        f"view {self.name!r}: expected a canvas of uint8 [batch, S, S, 3], got "
        f"{canvas.dtype} {list(shape)}. Do not scale pixels before the view."
      )
    # Every pixel minus 127.5 is exact in bfloat16, which is finest around zero.
    planes = jnp.moveaxis(canvas.astype(jnp.float32) - 127.5, -1, 1)
    planes = planes.astype(dtype)  # [b, 3, s, s]
    groups: dict[Pipeline, list[int]] = {}
    for i, pipeline in enumerate(self.pipelines):
      groups.setdefault(pipeline, []).append(i)
    masked = None

    def sample_masked(key):  # Images fold in 0 to count - 1.
      u = jax.random.uniform(jax.random.fold_in(key, self.count))
      return sample_masked_images(u, self._mask_probabilities)

    if any(pipeline.mask is not None for pipeline in self.pipelines):
      masked = jax.vmap(sample_masked)(keys)  # [b, n]

    def run(pipeline, indices):
      image_ids = jnp.array(indices)

      def run_row(planes, image_size, key, masked):
        image_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(image_ids)
        masked = None if masked is None else masked[image_ids]
        # All images share the canvas, so that XLA sees one product with their
        # stacked weights.
        run_images = jax.vmap(pipeline, in_axes=(None, None, 0, 0))
        return run_images(planes, image_size, image_keys, masked)

      return jax.vmap(run_row)(planes, image_size, keys, masked)

    parts = [run(pipeline, indices) for pipeline, indices in groups.items()]
    if len(parts) == 1:
      return parts[0]
    order = np.argsort(np.concatenate(list(groups.values())))
    return jax.tree.map(
      lambda *arrays: jnp.concatenate(arrays, axis=1)[:, order], *parts
    )


def resize_view(view: View, size: int) -> View:
  """Returns a view with equal crops, flips and colours at another size.

  It is named `VIEW@SIZE` and has no masks. The blur's kernel keeps its size in
  pixels.
  """
  replace = dataclasses.replace
  pipelines = tuple(
    replace(p, box_op=replace(p.box_op, size=size), mask=None)
    for p in view.pipelines
  )
  return View(f"{view.name}@{size}", pipelines, view.crops_of or view.name)


def build_views(
  config: Mapping[str, Any],
  *,
  mean: tuple[float, ...] = (0.5, 0.5, 0.5),
  std: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> dict[str, View]:
  """Builds the views of `config.views`: `NAME: dict(count, ops, crops_of)`.

  `ops` is one string for all images, or a list of `count` strings. `crops_of`
  names a view whose crops and flips to repeat: the crop and flip ops must be
  equal except for size and method. `mean` and `std` normalise channels in 0..1.

  Raises:
    ConfigError: for unknown options or ops, wrong arguments or order of ops, a
      list whose length differs from `count`, or a `crops_of` that names a view
      with different crops.
  """
  views = {}
  for name, entry in config.items():
    build = functools.partial(_build_view, name, mean, std)
    views[name] = options.build(build, entry, where=f"config.views.{name}")
  for view in views.values():
    if view.crops_of is not None:
      _check_crops_of(view, views)
  return views


def _check_crops_of(view: View, views: Mapping[str, View]) -> None:
  where = f"config.views.{view.name}.crops_of"
  source = views.get(view.crops_of)
  if source is None or source.crops_of is not None:
    choices = sorted(n for n, v in views.items() if v.crops_of is None)
    raise ConfigError(f"{where}={view.crops_of!r}, expected one of {choices}.")

  def list_crops(v):
    ignored = dict(size=1, method="bilinear")
    return [
      (dataclasses.replace(p.box_op, **ignored), p.flip) for p in v.pipelines
    ]

  if list_crops(view) != list_crops(source):
    raise ConfigError(
      f"{where}={view.crops_of!r}, which differs in count, crop or flip."
    )


def _build_view(
  name: str,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  *,
  ops: str | Sequence[str],
  count: Annotated[int, Range(1, _MAX_CROPS)] | None = None,
  crops_of: str | None = None,
) -> View:
  texts = [ops] * (count or 1) if isinstance(ops, str) else ops
  if count not in (None, len(texts)):
    raise ConfigError(
      f"{len(texts)} op strings for count={count}: set one, or one per crop."
    )
  pipelines = []
  for text in texts:
    try:
      pipeline = build_pipeline(text)
    except ConfigError as e:
      raise ConfigError(f"ops {options.shorten_repr(text)}: {e}") from None
    pipelines.append(dataclasses.replace(pipeline, mean=mean, std=std))
  if not pipelines:
    raise ConfigError("ops is empty.")
  _check_stackable(pipelines)
  return View(name, tuple(pipelines), crops_of)


def build_pipeline(text: str) -> Pipeline:
  """Builds the pipeline of an op string."""
  ops: list[Any] = []
  for op in parse_ops(text):
    built = build_op(op, OPS, "view op")
    if ops and STAGES.index(built.stage) < STAGES.index(ops[-1].stage):
      raise ConfigError(
        f"{op.name} ({built.stage}) comes after {ops[-1].name} "
        f"({ops[-1].stage}); expected {', '.join(STAGES)}."
      )
    ops.append(built)
  op_types = (geometry.BoxOp, geometry.Flip, PhotometricOp, MaskOp)
  boxes, flips, photometrics, masks = (
    [op for op in ops if isinstance(op, op_type)] for op_type in op_types
  )
  if len(boxes) != 1:
    raise ConfigError(
      f"{len(boxes)} ops choose the view's box; expected one resize or crop."
    )
  if len(flips) > 1 or len(masks) > 1:
    repeated = "flip" if len(flips) > 1 else "masks: blocks or keep"
    raise ConfigError(f"more than one op of {repeated}; keep one of them.")
  for op in ops:
    op.check(boxes[0].size)
  flip = flips[0] if flips else None
  mask = masks[0] if masks else None
  return Pipeline(boxes[0], flip, tuple(photometrics), mask)


def _check_stackable(pipelines: Sequence[Pipeline]) -> None:

  def list_properties(pipeline):
    mask = pipeline.mask
    keep = mask is not None and mask.field == "keep"
    return {
      "sizes": pipeline.size,
      "kinds of mask": type(mask).__name__,
      "patch sizes": getattr(mask, "patch", None),
      "counts of visible patches": mask.count(pipeline.size) if keep else None,
    }

  expected = list_properties(pipelines[0])
  for pipeline in pipelines[1:]:
    for name, value in list_properties(pipeline).items():
      if value != expected[name]:
        raise ConfigError(
          f"the op strings differ in {name}: {expected[name]} and {value}."
        )
