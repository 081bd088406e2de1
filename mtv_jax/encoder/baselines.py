"""Untrained baselines: raw pixels and a randomly initialised ViT.

mtv_jax.load("pixels:224")       raw pixels, patches of 16 ("pixels:224/14")
mtv_jax.load("random:B/16")      an untrained ViT ("random:mu/8@64" at 64)
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np

from mtv_jax.encoder import apply_fns
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.models import vit
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError

THUMBNAIL = 8  # side of the embedding of raw pixels
_PIXELS = re.compile(r"pixels:(\d+)(?:/(\d+))?")
_RANDOM = re.compile(r"random:(\w[\w-]*/\d+)(?:@(\d+))?")


def is_baseline(name: str) -> bool:
  """Whether a string names a baseline instead of a folder."""
  return name.startswith(("pixels:", "random:"))


def load(name: str, **options: Any) -> Encoder:
  """Builds the baseline `name`; options are `dtype` and `mesh` of `Encoder`."""
  if match := _PIXELS.fullmatch(name):
    return PixelEncoder(*map(int, match.groups("16")), **options)
  if match := _RANDOM.fullmatch(name):
    variant, size = match.groups("224")
    return random(variant, int(size), **options)
  raise InputError(
    f"{name!r} is not a baseline; expected pixels:SIZE, pixels:SIZE/PATCH, "
    f"random:VARIANT or random:VARIANT@SIZE, such as 'random:B/16@224'. "
    f"Variants: {', '.join(models.VARIANTS)}"
  )


def random(variant: str, size: int = 224, **options: Any) -> Encoder:
  """An image tower of a variant ('B/16') with initial parameters, seed 0.

  It pools by attention and has no text tower.
  """
  spec = models.ModelSpec.from_config({"variant": variant, "image_size": size})
  params = jax.tree.map(np.asarray, models.init_params(spec, jax.random.key(0)))
  return Encoder(
    spec,
    params,
    Preprocess(size=size),
    weights="untrained",
    source=f"random:{variant}@{size}",
    **options,
  )


class PixelEncoder(Encoder):
  """Normalised pixels as features.

  Patch features are the pixels, ordered (y, x, channel), in the only layer and
  as output; the pooled embedding is an 8 x 8 thumbnail of the image. There are
  no prefix tokens and no text tower.
  """

  def __init__(self, size: int, patch: int = 16, **options: Any):
    image = ViTSpec(
      image_size=size,
      patch_size=patch,
      width=3 * patch**2,
      depth=1,
      heads=1,
      mlp_dim=1,
      pool="mean",
      final_norm=False,
      projection=3 * THUMBNAIL**2,
    )
    super().__init__(
      models.ModelSpec(image=image),
      {"image": {}},
      Preprocess(size=size),
      weights="none",
      source=f"pixels:{size}/{patch}",
      **options,
    )

  def protocol(self):
    return {**super().protocol(), "image_pool": f"{THUMBNAIL}x{THUMBNAIL} area"}

  def _image_function(self, layers, outputs):
    return _pixel_function(self.spec, layers, outputs, self.mesh)


@functools.lru_cache(maxsize=64)
def _pixel_function(spec, layers, outputs, mesh) -> apply_fns.Function:
  patch = spec.image.patch_size

  def run(params, images):
    del params
    b, h, w, _ = images.shape
    grid = spec.image.grid_of(h, w)
    patches = vit.patchify(images, patch).reshape(b, *grid, -1)
    prefix = patches[:, 0, :0]
    pooled = _thumbnail(images).reshape(b, -1)
    features = {"patches": patches, "prefix": prefix, "pooled": pooled}
    features = {name: features[name] for name in outputs}
    for i in layers:
      features |= {f"layer{i}": patches, f"prefix{i}": prefix}
    return features

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


def _thumbnail(images):
  """Area means over the cells of an 8 x 8 grid."""
  matrices = []  # [8, side]: the share of each cell that every pixel covers
  for side in images.shape[1:3]:
    edges = np.arange(THUMBNAIL + 1)[:, None] * side / THUMBNAIL
    covered = np.clip(edges - np.arange(side), 0, 1)  # up to each edge
    share = np.diff(covered, axis=0) * THUMBNAIL / side
    matrices.append(share.astype(np.float32))
  return jax.numpy.einsum(
    "yh,xw,bhwc->byxc", *matrices, images, precision="highest"
  )
