"""A train step of few parameters, its batch, and meshes of some devices."""

import dataclasses
import functools
import math

import jax
import numpy as np

from mtv_jax.augment import views
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.objectives import build_objective
from mtv_jax.parallel.mesh import MESH_AXES, make_mesh
from mtv_jax.train.spec import ObjectiveWeight, StepSpec, init_params


def dino(**options):
  """DINO on the view of contrast; options as in a config."""
  own = dict(view_global="image", view_local=None, same_crop="include")
  return build_objective("dino", dict(own, prototypes=8) | options)


def make_spec(**changes):
  """Contrast on images of four patches."""
  text = dict(variant="mu", length=8, vocab_size=32)
  contrast = build_objective("contrastive", dict(init_bias=-2.0))
  spec = StepSpec(
    model=ModelSpec.from_config(dict(variant="mu/8", image_size=16, text=text)),
    dtype="float32",
    objectives={"contrastive": contrast},
    weights={"contrastive": ObjectiveWeight(1.0)},
    views=views.build_views({"image": dict(count=1, ops="resize(16)")}),
    seed=0,
    total_steps=100,
  )
  return dataclasses.replace(spec, **changes)


def make_batch(rows=16):
  """Random images and captions."""
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (rows, 24, 24, 3), dtype=np.uint8),
    "image_size": np.full((rows, 2), 24, np.int32),
    "caption": rng.integers(2, 32, (rows, 8), dtype=np.int32),
    # Uneven over the devices: the last devices lack pairs.
    "caption_valid": np.arange(rows) < rows - 3,
  }


def mesh_of(shape):
  """A mesh of the first devices, with so many along each axis."""
  axes = dict(zip(MESH_AXES, shape, strict=True))
  return make_mesh(axes, jax.devices()[: math.prod(shape)])


def params_of(spec, seed=1):
  """Initial parameters, from one compiled program."""
  init = jax.jit(functools.partial(init_params, spec))
  return init(jax.random.key(seed))
