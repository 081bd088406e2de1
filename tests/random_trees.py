"""Random parameters, so that no leaf is zero or one and nothing is compiled."""

import jax
import numpy as np

from mtv_jax.models import two_tower
from mtv_jax.objectives import base
from mtv_jax.utils.tree import map_with_names


def random_leaves(tree, *, std=0.2, seed=0):
  """The tree with leaves of N(0, std), in their order."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, std, x.shape).astype(np.float32), tree
  )


def random_params(spec, **options):
  """Parameters of a two-tower model."""
  return random_leaves(two_tower.abstract_params(spec), **options)


def head_shapes(head, spec):
  """Shapes of a prediction head's parameters."""
  init = base.Head(head.module(), head.example).init
  return jax.eval_shape(lambda key: init(key, spec), jax.random.key(0))


def fill(shapes, seed=0):
  """A tree of numbers of a trained model's size, by the leaves' names."""
  rng = np.random.default_rng(seed)

  def leaf(name, spec):
    *_, last = name.split("/")
    noise = rng.normal(size=spec.shape)
    if last == "kernel":
      stacked = len(spec.shape) == 3  # [depth, in, out]
      noise /= np.sqrt(np.prod(spec.shape[stacked:-1]))
    elif last.startswith("scale"):
      noise = 1 + 0.1 * noise
    else:
      noise *= 0.3
    return jax.numpy.asarray(noise, spec.dtype)

  return map_with_names(leaf, shapes)
