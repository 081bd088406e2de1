"""PCGrad: gradient surgery for conflicting objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from mtv_jax.train.balance.base import Balance
from mtv_jax.utils.tree import flatten_with_names, map_with_names


@dataclasses.dataclass(frozen=True)
class PCGrad(Balance):
  """PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    for each i, for each j != i in random order:
      if g_i . g_j < 0:  g_i <- g_i - (g_i . g_j / |g_j|^2) g_j
    gradient = sum_i g_i

  g_i starts as the gradient of w_i L_i; g_j is the unprojected gradient. Each
  objective draws its order from seed, step and name. Projections are linear
  combinations of the g_j, so their coefficients follow from inner products.
  Parameters outside `parameters` get the sum of gradients.

  Each objective runs its own forward and backward pass, also with
  `config.accumulate`, over the views that it reads. This costs more than a
  plain step only if objectives share a view.
  """

  combines: ClassVar[bool] = True
  # The image encoder, or all modules that several objectives read (towers and
  # heads), as one vector.
  parameters: Literal["image", "shared"] = "image"

  @property
  def uses_encoder_gradients(self) -> bool:
    """As in the base class."""
    return self.parameters == "image"

  def combine_gradients(
    self,
    gradients: Mapping[str, PyTree],
    shared: frozenset[str],
    keys: Mapping[str, Key[Array, ""]],
  ) -> PyTree:
    """As in the base class."""
    modules = {"image"} if self.parameters == "image" else shared
    prefixes = tuple(f"{module}/" for module in modules)
    trees = list(gradients.values())
    vectors = [
      [
        leaf
        for name, leaf in flatten_with_names(g)
        if name.startswith(prefixes)
      ]
      for g in trees
    ]
    products = jnp.stack(
      [jnp.stack([optax.tree.vdot(a, b) for b in vectors]) for a in vectors]
    )  # [T, T]
    keys = jnp.stack([keys[name] for name in gradients])
    scales = jnp.sum(projection_coefficients(products, keys), axis=0)  # [T]

    def total(name, *leaves):
      if name.startswith(prefixes):
        leaves = [scales[i] * leaf for i, leaf in enumerate(leaves)]
      return sum(leaves)

    return map_with_names(total, *trees)


def projection_coefficients(
  products: Float[Array, "t t"], keys: Key[Array, " t"]
) -> Float[Array, "t t"]:
  """Row i has the coefficients of all g_j in the projected g_i.

  `products` are the inner products g_i . g_j; `keys` draw each row's order.
  """
  count = len(products)

  def row(i, key):
    def project(coefficients, j):
      product = jnp.sum(coefficients * products[:, j])
      norm = products[j, j]
      share = product / jnp.where(norm > 0, norm, 1.0)
      conflict = (product < 0) & (norm > 0) & (j != i)
      step = jnp.where(conflict, share, 0.0)
      return coefficients - step * jax.nn.one_hot(j, count), None

    order = jax.random.permutation(key, count)
    return jax.lax.scan(project, jax.nn.one_hot(i, count), order)[0]

  return jax.vmap(row)(jnp.arange(count), keys)
