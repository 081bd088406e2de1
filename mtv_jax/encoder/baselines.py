"""Untrained baselines: raw pixels and a randomly initialised ViT.

mtv_jax.load("pixels:224")       raw pixels, patches of 16 ("pixels:224/14")
mtv_jax.load("random:B/16")      an untrained ViT ("random:mu/8@64" at 64)
"""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
from jax.sharding import Mesh

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


def load(
  name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> Encoder:
  """Builds the baseline `name`; other arguments as of `mtv_jax.load`.

  Raises:
    InputError: for another name, an unknown variant, or a size that the patch
      does not divide.
  """
  if match := _PIXELS.fullmatch(name):
    size, patch = (int(x) for x in match.groups("16"))
    return PixelEncoder(size, patch, dtype=dtype, mesh=mesh)
  if match := _RANDOM.fullmatch(name):
    variant, size = match.groups("224")
    return random(variant, int(size), dtype=dtype, mesh=mesh)
  raise InputError(
    f"{name!r} is not a baseline; expected pixels:SIZE, pixels:SIZE/PATCH, "
    f"random:VARIANT or random:VARIANT@SIZE, such as 'random:B/16@224'. "
    f"Variants: {', '.join(models.VARIANTS)}"
  )


def random(
  variant: str,
  size: int = 224,
  *,
  dtype: str = "float32",
  mesh: Mesh | None = None,
) -> Encoder:
  """An image tower of a variant ('B/16') with initial parameters, seed 0.

  It pools by attention and has no text tower.
  """
  spec = models.ModelSpec.from_config({"variant": variant, "image_size": size})
  params = jax.tree.map(np.asarray, models.init_params(spec, jax.random.key(0)))
  return Encoder(
    spec,
    params,
    Preprocess(size=size),
    mesh=mesh,
    dtype=dtype,
    weights="untrained",
    source=f"random:{variant}@{size}",
  )


class PixelEncoder(Encoder):
  """Normalised pixels as features.

  Patch features are the pixels, ordered (y, x, channel), in the only layer and
  as output; the pooled embedding is an 8 x 8 thumbnail of the image. There are
  no prefix tokens and no text tower.
  """

  def __init__(
    self,
    size: int,
    patch: int = 16,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
  ):
    image = ViTSpec(
      image_size=size,
      patch_size=patch,
      width=3 * patch**2,
      depth=1,
      heads=1,
      mlp_dim=1,
      pool="mean",
      projection=3 * THUMBNAIL**2,
    )
    super().__init__(
      models.ModelSpec(image=image),
      {"image": {}},
      Preprocess(size=size),
      mesh=mesh,
      dtype=dtype,
      weights="none",
      source=f"pixels:{size}/{patch}",
    )

  def protocol(self):
    return {**super().protocol(), "image_pool": f"{THUMBNAIL}x{THUMBNAIL} area"}

  def _image_function(self, taps, outputs):
    return _pixel_function(self.spec, taps, outputs, self.mesh)


@functools.lru_cache(maxsize=64)
def _pixel_function(spec, taps, outputs, mesh) -> apply_fns.Function:
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
    for tap in taps:
      features |= {f"layer{tap}": patches, f"prefix{tap}": prefix}
    return features

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


def _thumbnail(images):
  """Area means over the cells of an 8 x 8 grid."""
  rows, columns = (_area_matrix(side, THUMBNAIL) for side in images.shape[1:3])
  return jax.numpy.einsum(
    "yh,xw,bhwc->byxc", rows, columns, images, precision="highest"
  )


def _area_matrix(size: int, new_size: int) -> np.ndarray:
  """`[new, old]`: the share of each new cell that every old one covers."""
  edges = np.arange(new_size + 1)[:, None] * size / new_size
  covered = np.clip(edges - np.arange(size), 0, 1)  # up to each edge
  return (np.diff(covered, axis=0) * new_size / size).astype(np.float32)
