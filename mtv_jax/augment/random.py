"""Keys of a view's rows, and samples from uniform numbers."""

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def step_key(
  seed_key: Key[Array, ""], name: str, step: Int[Array, ""] | int
) -> Key[Array, ""]:
  """A key of a step, from seed, step and name."""
  # crc32 and not hash(), which differs from one process to the next.
  key = jax.random.fold_in(seed_key, zlib.crc32(name.encode()))
  return jax.random.fold_in(key, step)


def row_keys(
  seed_key: Key[Array, ""], name: str, step: Int[Array, ""] | int, rows: int
) -> Key[Array, " {rows}"]:
  """A key for each row of the global batch, from seed, view, step and row.

  Independent of the mesh and of the number of hosts, so that a run resumed on
  another pod sees the same crops. `name` is the view's.
  """
  key = step_key(seed_key, name, step)
  return jax.vmap(lambda r: jax.random.fold_in(key, r))(jnp.arange(rows))


def image_keys(
  keys: Key[Array, " b"], name: str, count: int
) -> Key[Array, " b*{count}"]:
  """Keys of the `count` images of each row for the use `name`.

  In the order of the images of a view, `[b, count]` flattened.
  """
  use = zlib.crc32(name.encode())

  def row(key):
    key = jax.random.fold_in(key, use)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

  return jax.vmap(row)(keys).reshape(-1)


def bernoulli(u: Float[Array, ""], p: float | int) -> Bool[Array, ""]:
  """True with probability `p`, exactly so for 0 and 1."""
  return u < p


def uniform(
  u: Float[Array, "*n"], low: float | int, high: float | int
) -> Float[Array, "*n"]:
  """Uniform from `low` to `high`."""
  return low + u * (high - low)


def ranks(u: Float[Array, " n"]) -> Int[Array, " n"]:
  """The rank of each entry in ascending order.

  Compares all pairs, which for a few hundred numbers is cheaper than sorting
  twice.
  """
  index = jnp.arange(u.shape[0])
  before = u[None, :] < u[:, None]  # [n, n]
  # Of equal numbers the first one wins, so that no rank occurs twice.
  tied = (u[None, :] == u[:, None]) & (index[None, :] < index[:, None])
  return (before | tied).sum(axis=1, dtype=jnp.int32)
