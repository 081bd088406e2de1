"""Untrained baselines: raw pixels and a randomly initialised ViT.

mtv_jax.load("pixels:224")       raw pixels, patch size 16 ("pixels:224/14": 14)
mtv_jax.load("random:B/16")      an untrained ViT ("random:mu/8@64": size 64)
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np

from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import apply_fns
from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower as models
from mtv_jax.models import vit
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import replicated_sharding
from mtv_jax.utils.errors import InputError

THUMBNAIL = 8  # Side of the thumbnail that embeds raw pixels.
_PIXELS = re.compile(r"pixels:(\d+)(?:/(\d+))?")
_RANDOM = re.compile(r"random:(\w[\w-]*/\d+)(?:@(\d+))?")


def is_baseline(name: str) -> bool:
  """Whether a string names a baseline instead of a folder."""
  return name.startswith(("pixels:", "random:"))


def load(name: str, **options: Any) -> Encoder:
  """Builds the baseline `name`; options are `Encoder`'s `dtype` and `mesh`."""
  if match := _PIXELS.fullmatch(name):
    return PixelEncoder(*map(int, match.groups("16")), **options)
  model = read_model(name)
  preprocess = Preprocess.from_dict(model.preprocess)
  source = name if "@" in name else f"{name}@{preprocess.size}"
  options |= {"weights": "untrained", "source": source}
  return Encoder(model.spec, model.params, preprocess, **options)


def read_model(name: str, *, with_params: bool = True) -> ConvertedModel:
  """Reads a baseline as a model without a text tower, to initialise a run.

  `random:VARIANT` is initialised with seed 0 and uses attention pooling. The
  only block of `pixels:SIZE` adds zero: its output is the patches' pixels.
  """
  if match := _RANDOM.fullmatch(name):
    variant, size = match[1], int(match[2] or 224)
    spec = models.ModelSpec.from_config(dict(variant=variant, image_size=size))
    params = models.init_params(spec, jax.random.key(0)) if with_params else {}
  elif match := _PIXELS.fullmatch(name):
    size, patch = map(int, match.groups("16"))
    spec, params = _build_pixel_spec(size, patch), {}
    if with_params:
      shapes = models.abstract_params(spec)
      params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
      kernel = np.eye(spec.image.width, dtype=np.float32)
      params["image"]["patch_embed"]["kernel"] = kernel
  else:
    raise InputError(
      f"{name!r} is not a baseline; expected pixels:SIZE, pixels:SIZE/PATCH, "
      "random:VARIANT or random:VARIANT@SIZE, such as 'random:B/16@224'. "
      f"Variants: {', '.join(models.VARIANTS)}"
    )
  preprocess = Preprocess(size=size).to_dict()
  return ConvertedModel(spec, jax.tree.map(np.asarray, params), preprocess)


def _build_pixel_spec(size: int, patch: int) -> models.ModelSpec:
  tower = dict(width=3 * patch**2, depth=1, heads=1, mlp_dim=1, pool="mean")
  tower |= dict(final_norm=False, projection=3 * THUMBNAIL**2)
  image = ViTSpec(image_size=size, patch_size=patch, **tower)
  return models.ModelSpec(image=image)


class PixelEncoder(Encoder):
  """Normalised pixels as features.

  Patch features and the only layer's output are the patch's pixels, ordered
  (y, x, channel). The pooled embedding is an 8 x 8 thumbnail. The encoder has
  neither prefix tokens nor a text tower.
  """

  def __init__(self, size: int, patch: int = 16, **options: Any):
    spec = _build_pixel_spec(size, patch)
    options |= {"weights": "none", "source": f"pixels:{size}/{patch}"}
    super().__init__(spec, {"image": {}}, Preprocess(size=size), **options)

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
    pooled = _make_thumbnail(images).reshape(b, -1)
    features = {"patches": patches, "prefix": prefix, "pooled": pooled}
    features = {name: features[name] for name in outputs}
    for i in layers:
      features |= {f"layer{i}": patches, f"prefix{i}": prefix}
    return features

  return jax.jit(run, out_shardings=replicated_sharding(mesh))


def _make_thumbnail(images):
  """Area averages over an 8 x 8 grid, [B, 8, 8, C]."""
  matrices = []  # [8, side]: each pixel's share of each cell.
  for side in images.shape[1:3]:
    edges = np.arange(THUMBNAIL + 1)[:, None] * side / THUMBNAIL
    coverage = np.clip(edges - np.arange(side), 0, 1)  # Up to each edge.
    share = np.diff(coverage, axis=0) * THUMBNAIL / side
    matrices.append(share.astype(np.float32))
  return jax.numpy.einsum(
    "yh,xw,bhwc->byxc", *matrices, images, precision="highest"
  )
