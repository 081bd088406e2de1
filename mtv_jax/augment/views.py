"""Views of a canvas, made on the device inside the train step.

A view is a named transform of the stored canvas, written as ops in the
mini-language of `config.parse_ops`:

  resize(S) | crop(S, min_area, max_area)   one of them: what is shown
  flip(p)                                   mirrored
  jitter, grey, blur, solarize              colours, in the order written
  blocks(min, max, p) | keep(ratio)         patches to hide, or to keep

An antialiased crop is two small matrix products, so that the chip makes every
view faster than a host could. Labels follow by `geometry.crop_maps` and
`geometry.crop_boxes`.

Values are in [-1, 1], as SigLIP and big_vision normalise: `x / 127.5 - 1`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mtv_jax.augment import geometry, masks, photometrics
from mtv_jax.config.op_strings import build_op, parse_ops
from mtv_jax.utils.errors import ConfigError, did_you_mean

GEOMETRY = {
  "resize": geometry.Resize,
  "crop": geometry.Crop,
  "flip": geometry.Flip,
}
PHOTOMETRY = {
  "jitter": photometrics.Jitter,
  "grey": photometrics.Grey,
  "blur": photometrics.Blur,
  "solarize": photometrics.Solarize,
}
MASKS = {"blocks": masks.Blocks, "keep": masks.Keep}
# In the order in which ops have to be written.
STAGES = {"geometry": GEOMETRY, "photometrics": PHOTOMETRY, "masks": MASKS}
OPS = GEOMETRY | PHOTOMETRY | MASKS


@flax.struct.dataclass
class Made:
  """A view of every row of a batch; `n` is the view's `count`.

  Attributes:
    images: `[b, n, size, size, 3]` in [-1, 1], in the compute dtype.
    box: float32 `[b, n, 4]`, the region of the canvas shown, `(y0, x0, y1,
      x1)` in the unit square.
    flipped: bool `[b, n]`, whether it is then mirrored.
    mask: bool `[b, n, patches]`, True where a patch is hidden; None without
      `blocks`.
    keep: int32 `[b, n, kept]`, visible patches in ascending order; None
      without `keep`.
  """

  # Unchecked, since transforms also rebuild this with shapes and shardings.
  images: Any
  box: Any
  flipped: Any
  mask: Any = None
  keep: Any = None


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """The ops of one view of one image.

  Attributes:
    region: the op that says what is shown.
    flip: the op that mirrors, if any.
    photometrics: ops on colours, in order.
    mask: the op that hides patches, if any.
  """

  region: geometry.Resize | geometry.Crop
  flip: geometry.Flip | None = None
  photometrics: tuple[Any, ...] = ()
  mask: masks.Blocks | masks.Keep | None = None

  def __call__(
    self,
    planes: Float[Array, "3 s s"],
    image_size: Int[Array, "2"],
    key: Key[Array, ""],
    masked: Bool[Array, ""],
  ) -> Made:
    """Makes the view.

    Args:
      planes: the canvas minus 127.5, in the compute dtype.
      image_size: height and width of the original picture.
      key: of this row and image of the view.
      masked: whether `blocks` masks it.
    """
    size = self.region.size
    u = jax.random.uniform(key, (self._draws(),))
    box = self.region.region(image_size, u[: self.region.draws()])
    u = u[self.region.draws() :]
    flipped = jnp.zeros((), bool)
    if self.flip is not None:
      flipped, u = self.flip.flipped(u[:1]), u[1:]
    image = self._shown(planes, box, flipped)
    if self.photometrics:
      image = tuple(jnp.clip(image / 255.0 + 0.5, 0.0, 1.0))
      for op in self.photometrics:
        if op.p > 0:
          image = op(image, u[: op.draws()], planes.dtype)
        # What an op set to p=0 would have used stays unused, so that the
        # others' draws are the same without it.
        u = u[op.draws() :]
      image = 2.0 * jnp.stack(image) - 1.0
    else:
      image = image / 127.5
    hidden = None
    if _hides(self):
      hidden = self.mask(u, masked, size=size)
    elif self.mask is not None:
      hidden = self.mask(u, size=size)
    return Made(
      images=jnp.moveaxis(image, 0, -1).astype(planes.dtype),
      box=box,
      flipped=flipped,
      mask=hidden if _hides(self) else None,
      keep=None if _hides(self) else hidden,
    )

  def _draws(self) -> int:
    count = sum(op.draws() for op in (self.region, *self.photometrics))
    count += 0 if self.flip is None else self.flip.draws()
    if self.mask is not None:
      count += self.mask.draws(self.region.size)
    return count

  def _shown(self, planes, box, flipped):
    size = self.region.size
    if isinstance(self.region, geometry.Resize) and planes.shape[1] == size:
      return jnp.where(flipped, planes[..., ::-1], planes).astype(jnp.float32)
    return geometry.resample(planes, box, flipped, size=size)


@dataclasses.dataclass(frozen=True)
class View:
  """A named view: what each of its `count` images of a canvas goes through.

  Attributes:
    name: in the config.
    pipelines: one for each of the `count` images; equal ones run as one.
  """

  name: str
  pipelines: tuple[Pipeline, ...]

  @property
  def count(self) -> int:
    """Images made of a canvas."""
    return len(self.pipelines)

  @property
  def size(self) -> int:
    """Pixels a side."""
    return self.pipelines[0].region.size

  @property
  def patch(self) -> int | None:
    """Patch size the masks are made for; None without masks."""
    mask = self.pipelines[0].mask
    return None if mask is None else mask.patch

  @property
  def mask_count(self) -> int:
    """The most patches that `blocks` hides of a row's images; 0 without it.

    A static bound on the True entries of each row of `Made.mask`, for losses
    that gather them. Where `blocks` is never to mask it is that of one image.
    """
    counts = sorted(
      p.mask.count(self.size) for p in self.pipelines if _hides(p)
    )
    return sum(counts[-max(masks.most_chosen(self._shares), 1) :])

  @property
  def _shares(self) -> tuple[float, ...]:
    """How often `blocks` masks each image."""
    return tuple(float(p.mask.p) if _hides(p) else 0.0 for p in self.pipelines)

  def __call__(
    self,
    canvas: UInt8[Array, "b s s 3"],
    image_size: Int[Array, "b 2"],
    keys: Key[Array, "b"],
    dtype: Any,
  ) -> Made:
    """Makes the view; each row from its own canvas, size and key alone.

    Args:
      canvas: stored pictures, each squashed to a square.
      image_size: height and width of the original pictures.
      keys: one for each row, from `row_keys`.
      dtype: compute dtype of the resampling, and dtype of the images.

    Raises:
      ValueError: for a canvas of another shape or dtype.
    """
    shape = canvas.shape
    if canvas.dtype != jnp.uint8 or shape[1:] != (shape[1], shape[1], 3):
      raise ValueError(
        f"view {self.name!r}: a canvas is uint8 [batch, S, S, 3], got "
        f"{canvas.dtype} {list(shape)}. Pixels are scaled here, not before."
      )
    # 127.5 and not 128: every pixel minus it is exact in bfloat16, whose
    # rounding is finest around zero.
    planes = jnp.moveaxis(canvas.astype(jnp.float32) - 127.5, -1, 1)
    planes = planes.astype(dtype)
    groups: dict[Pipeline, list[int]] = {}
    for i, pipeline in enumerate(self.pipelines):
      groups.setdefault(pipeline, []).append(i)
    masked = jax.vmap(self._masked)(keys)
    parts = [
      _make(pipeline, planes, image_size, keys, masked, indices)
      for pipeline, indices in groups.items()
    ]
    if len(parts) == 1:
      return parts[0]
    order = np.argsort(np.concatenate(list(groups.values())))
    return jax.tree.map(
      lambda *arrays: jnp.concatenate(arrays, axis=1)[:, order], *parts
    )

  def _masked(self, key: Key[Array, ""]) -> Bool[Array, "n"]:
    """Which of a row's images `blocks` masks."""
    # Images have the numbers below.
    u = jax.random.uniform(jax.random.fold_in(key, self.count))
    return masks.chosen(u, self._shares)


def _hides(pipeline: Pipeline) -> bool:
  """Whether it has `blocks`."""
  return isinstance(pipeline.mask, masks.Blocks)


def _make(
  pipeline: Pipeline,
  planes: Float[Array, "b 3 s s"],
  image_size: Int[Array, "b 2"],
  keys: Key[Array, "b"],
  masked: Bool[Array, "b n"],
  indices: list[int],
) -> Made:
  """The images at `indices` of a view, which share a pipeline."""
  of = jnp.array(indices)

  def row(planes, image_size, key, masked):
    key_of = functools.partial(jax.random.fold_in, key)
    # The canvas is the same for all, so that XLA sees one product with the
    # stacked weights of all images.
    make = jax.vmap(pipeline, in_axes=(None, None, 0, 0))
    return make(planes, image_size, jax.vmap(key_of)(of), masked[of])

  return jax.vmap(row)(planes, image_size, keys, masked)


def build_views(config: Mapping[str, Any]) -> dict[str, View]:
  """The views of `config.views`: `NAME: dict(count, ops)`.

  `ops` is one string for all, or a list with one string for each of `count`.

  Raises:
    ConfigError: for unknown options or ops, wrong arguments, ops in an order
      that can't be, and a list of another length than `count`.
  """
  return {name: _build_view(name, entry) for name, entry in config.items()}


def _build_view(name: str, entry: Mapping[str, Any]) -> View:
  where = f"config.views.{name}"
  options = ["count", "ops"]
  unknown = sorted(set(entry) - set(options))
  if unknown:
    raise ConfigError(
      f"{where}: no option {unknown[0]!r}. {did_you_mean(unknown[0], options)}"
    )
  if "ops" not in entry:
    raise ConfigError(f"{where}: no ops; give them, such as ops='resize(224)'.")
  texts = entry["ops"]
  count = entry.get("count", 1 if isinstance(texts, str) else len(texts))
  if not isinstance(count, int) or count < 1:
    raise ConfigError(f"{where}: count={count!r}; expected 1 or more.")
  texts = [texts] * count if isinstance(texts, str) else list(texts)
  if len(texts) != count:
    raise ConfigError(
      f"{where}: {len(texts)} op strings for count={count}; give one string, "
      "or one for each."
    )
  pipelines = []
  for text in texts:
    try:
      pipelines.append(build_pipeline(text))
    except ConfigError as e:
      raise ConfigError(f"{where}, ops {text!r}: {e}") from None
  view = View(name, tuple(pipelines))
  _check_alike(where, view)
  return view


def build_pipeline(text: str) -> Pipeline:
  """Reads the ops of one view.

  Raises:
    ConfigError: for bad syntax, unknown ops, wrong arguments, or ops that
      don't go together.
  """
  found: dict[str, list[Any]] = {stage: [] for stage in STAGES}
  latest, stages = None, list(STAGES)
  for op in parse_ops(text):
    built = build_op(op, OPS, "view op")
    stage = next(s for s, ops in STAGES.items() if op.name in ops)
    if latest and stages.index(stage) < stages.index(latest[0]):
      raise ConfigError(
        f"{op.name} ({stage}) comes after {latest[1]} ({latest[0]}); write "
        "what is shown first, then colours, then masks: "
        "'crop(224)|flip|jitter|blocks'."
      )
    latest = stage, op.name
    found[stage].append(built)
  shown = found["geometry"]
  flips = [op for op in shown if isinstance(op, geometry.Flip)]
  regions = [op for op in shown if not isinstance(op, geometry.Flip)]
  hidden = found["masks"]
  if len(regions) != 1:
    raise ConfigError(
      f"{len(regions)} ops say what is shown; expected exactly one "
      "'resize(S)' (the whole picture) or 'crop(S, min_area, max_area)'."
    )
  if len(flips) > 1 or len(hidden) > 1:
    double = "flip" if len(flips) > 1 else "masks: blocks or keep"
    raise ConfigError(f"more than one op of {double}; leave one of them.")
  pipeline = Pipeline(
    region=regions[0],
    flip=flips[0] if flips else None,
    photometrics=tuple(found["photometrics"]),
    mask=hidden[0] if hidden else None,
  )
  _check_fits(pipeline)
  return pipeline


def _check_fits(pipeline: Pipeline) -> None:
  """Raises ConfigError where masks or blurs don't suit the view's size."""
  size = pipeline.region.size
  if pipeline.mask is not None:
    pipeline.mask.count(size)
  for op in pipeline.photometrics:
    if isinstance(op, photometrics.Blur) and op.kernel // 2 >= size:
      raise ConfigError(
        f"blur: {op.kernel} taps are too many for {size} pixels; use at most "
        f"{2 * size - 1}."
      )


def _check_alike(where: str, view: View) -> None:
  """Raises ConfigError where a view's images can't be stacked."""

  def shapes(pipeline):
    mask = pipeline.mask
    kept = mask.count(view.size) if isinstance(mask, masks.Keep) else None
    return {
      "sizes": pipeline.region.size,
      "kinds of mask": type(mask).__name__,
      "patch sizes": getattr(mask, "patch", None),
      "counts of visible patches": kept,
    }

  first = shapes(view.pipelines[0])
  for pipeline in view.pipelines[1:]:
    for what, value in shapes(pipeline).items():
      if value != first[what]:
        raise ConfigError(
          f"{where}: its op strings give different {what}, {first[what]} and "
          f"{value}, which can't be one array; make them equal, or two views."
        )


def row_keys(
  seed_key: Key[Array, ""],
  name: str,
  step: Int[Array, ""] | int,
  rows: int,
) -> Key[Array, "{rows}"]:
  """A key for each row of the global batch, of seed, view, step and row only.

  Independent of the mesh and of the number of hosts, so that a run resumed on
  another pod sees the same crops.

  Args:
    seed_key: of the run.
    name: of the view.
    step: of the run.
    rows: of the global batch.
  """
  # crc32 and not hash(), which differs from one process to the next.
  key = jax.random.fold_in(seed_key, zlib.crc32(name.encode()))
  key = jax.random.fold_in(key, step)
  return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(rows))
