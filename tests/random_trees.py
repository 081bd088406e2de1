"""Random parameters, so that no leaf is zero or one and nothing is compiled."""

import jax
import numpy as np

from mtv_jax.models import two_tower


def random_leaves(tree, *, std=0.2, seed=0):
  """The tree with leaves of N(0, std), in their order."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0, std, x.shape).astype(np.float32), tree
  )


def random_params(spec, **options):
  """Parameters of a two-tower model."""
  return random_leaves(two_tower.abstract_params(spec), **options)
