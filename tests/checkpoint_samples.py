"""A small train state of several dtypes, to save and restore across meshes."""

import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtv_jax.checkpoint.checkpointer import Checkpointer
from mtv_jax.utils.tree import flatten_with_names


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  teacher: dict
  ema: dict


def make_mesh(*shape):
  return jax.make_mesh(
    shape,
    ("data", "fsdp", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[: math.prod(shape)],
  )


def spec(leaf):
  return P(None, "fsdp") if leaf.ndim == 2 else P()


def shardings(tree, m):
  return jax.tree.map(lambda x: NamedSharding(m, spec(x)), tree)


def make_state(m, seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "image": {
      "kernel": rng.normal(size=(6, 8)).astype(np.float32),
      "bias": rng.normal(size=3).astype(jnp.bfloat16),
    },
    # Too large to be stored in the index.
    "text": {"embedding": rng.normal(size=(64, 40)).astype(np.float32)},
    "heads": {"logit_scale": np.float32(rng.normal()).reshape(())},
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  state = State(
    step=jnp.int32(seed),
    params=params,
    opt_state=tx.init(jax.tree.map(lambda x: x + x, params)),
    teacher={"image": params["image"]},
    ema={},
  )
  return jax.device_put(state, shardings(state, m))


def abstract(state, m):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(m, spec(x))
    ),
    state,
  )


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(
    flatten_with_names(a), flatten_with_names(b), strict=True
  ):
    assert x.dtype == y.dtype, name
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def open_checkpointer(folder, **kwargs):
  return Checkpointer(folder, **({"every_steps": 1, "keep": 3} | kwargs))
