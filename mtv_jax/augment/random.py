"""Random keys of a view's rows, and samples from uniform numbers."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def step_key(
  seed_key: Key[Array, ""], name: str, step: Int[Array, ""] | int
) -> Key[Array, ""]:
  """Folds name and step into a seed key."""
  # crc32, since hash() differs between processes.
  key = jax.random.fold_in(seed_key, zlib.crc32(name.encode()))
  return jax.random.fold_in(key, step)


def row_keys(
  seed_key: Key[Array, ""], name: str, step: Int[Array, ""] | int, rows: int
) -> Key[Array, " {rows}"]:
  """One key per row of the global batch, from seed, view, step and row.

  Independent of the mesh and the number of hosts, so that a run resumed on
  another pod computes identical crops. `name` is the view's name.
  """
  key = step_key(seed_key, name, step)
  return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(rows))


def image_keys(
  keys: Key[Array, " b"], name: str, count: int
) -> Key[Array, " b*{count}"]:
  """Keys of each row's `count` images, for the purpose `name`.

  Ordered as a view's images, `[b, count]` flattened.
  """
  name_hash = zlib.crc32(name.encode())

  def fold_row(key):
    key = jax.random.fold_in(key, name_hash)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

  return jax.vmap(fold_row)(keys).reshape(-1)


def bernoulli(u: Float[Array, "*n"], p: float | int) -> Bool[Array, "*n"]:
  """True with probability `p`, exact for 0 and 1."""
  return u < p


def uniform(
  u: Float[Array, "*n"], low: float | int, high: float | int
) -> Float[Array, "*n"]:
  """Uniform from `low` to `high`."""
  return low + u * (high - low)


def ranks(u: Float[Array, " n"]) -> Int[Array, " n"]:
  """Rank of each entry in ascending order.

  Compares all pairs: cheaper than sorting twice for a few hundred numbers.
  """
  index = jnp.arange(u.shape[0])
  before = u[None, :] < u[:, None]  # [n, n]
  # Ties rank by index, so that ranks are unique.
  tied = (u[None, :] == u[:, None]) & (index[None, :] < index[:, None])
  return (before | tied).sum(axis=1, dtype=jnp.int32)
