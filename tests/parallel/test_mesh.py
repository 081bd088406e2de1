"""Meshes, batch rows and the rules that shard parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mtv_jax.models.two_tower import ModelSpec, abstract_params
from mtv_jax.models.vit import ViTSpec
from mtv_jax.parallel.mesh import (
  MESH_AXES,
  HostRows,
  check_batch_size,
  data_rows,
  find_host_rows,
  make_mesh,
  shard_batch,
)
from mtv_jax.parallel.rules import (
  all_gather_params,
  check_param_rules,
  check_sharding_rules,
  constrain_batch,
  sharding_table,
  tree_shardings,
)
from mtv_jax.utils.tree import flatten_with_names


def test_mesh_and_batch():
  mesh = make_mesh(dict(data=-1, fsdp=2, tensor=2))
  assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2)
  assert find_host_rows(mesh) == HostRows(index=0, count=1)
  batch = {"x": np.arange(16).reshape(8, 2)}
  sharded = shard_batch(batch, mesh)["x"]
  np.testing.assert_array_equal(sharded, batch["x"])
  assert sharded.sharding.shard_shape(sharded.shape) == (2, 2)


def test_a_batch_that_the_mesh_does_not_divide_is_rejected_with_a_size():
  mesh = make_mesh(dict(data=4, fsdp=2))
  check_batch_size("rows", 16, mesh)
  with pytest.raises(ValueError, match="rows is 12.* to 8 or 16"):
    check_batch_size("rows", 12, mesh)
  with pytest.raises(ValueError, match="Set it to 8, or"):
    check_batch_size("rows", 4, mesh)
  with pytest.raises(ValueError, match="rows is 24.* = 16 .* to 16 or 32"):
    check_batch_size("rows", 24, mesh, accumulate=2)


def _abstract():
  shapes = {
    "image/blocks/attention/qkv/kernel": (2, 16, 48),
    "image/blocks/attention/qkv/bias": (2, 48),
    "image/blocks/attention/out/kernel": (2, 16, 16),
    "image/blocks/mlp/fc1/kernel": (2, 16, 64),
    "image/blocks/mlp/fc2/kernel": (2, 64, 16),
    "image/norm/scale": (16,),
    "text/token_embedding": (258, 16),
    "text/odd/mlp/fc1/kernel": (2, 15, 64),
    "heads/contrastive/logit_bias": (),
  }
  return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def test_every_kernel_of_a_swiglu_tower_is_split():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  spec = ModelSpec(
    image=ViTSpec(width=32, depth=1, heads=2, mlp_dim=64, mlp="swiglu")
  )
  shardings = flatten_with_names(tree_shardings(abstract_params(spec), mesh))
  kernels = {
    name: sharding.spec
    for name, sharding in shardings
    if name.endswith("kernel")
  }
  assert kernels["image/blocks/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
  assert not [name for name, spec in kernels.items() if not any(spec)]


def test_sharding_rules_by_parameter():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  sharded = tree_shardings(_abstract(), mesh)
  assert {k: v.spec for k, v in sharded.items()} == {
    "image/blocks/attention/qkv/kernel": P(None, "fsdp", "tensor"),
    "image/blocks/attention/qkv/bias": P(None, "tensor"),
    "image/blocks/attention/out/kernel": P(None, "tensor", "fsdp"),
    "image/blocks/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
    "image/blocks/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
    "image/norm/scale": P(None),
    "text/token_embedding": P(None, "fsdp"),
    # 15 rows can't be split in two, so they stay whole.
    "text/odd/mlp/fc1/kernel": P(None, None, "tensor"),
    "heads/contrastive/logit_bias": P(),
  }


def test_optimizer_moments_are_sharded_like_their_parameters():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  tree = {"opt_state": [{"mu": _abstract()}], "params": _abstract()}
  sharded = tree_shardings(tree, mesh)
  assert sharded["opt_state"][0]["mu"] == sharded["params"]


def test_rules_of_the_config_come_first_and_must_match():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  rules = [("image/norm/scale", ("fsdp",))]
  sharded = tree_shardings(_abstract(), mesh, rules)
  assert sharded["image/norm/scale"].spec == P("fsdp")
  check_sharding_rules(rules, _abstract())
  with pytest.raises(ValueError, match="matches no parameter"):
    check_sharding_rules([("image/nrom/.*", ("fsdp",))], _abstract())
  for axes, message in ((("fdsp",), "Did you mean 'fsdp'"), (3, "is 3, exp")):
    with pytest.raises(ValueError, match=message):
      check_sharding_rules([("image/norm/.*", axes)], _abstract())


def test_sharding_table_counts_bytes_per_device():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  shapes = _abstract()
  sharded = tree_shardings(shapes, mesh)
  abstract = {
    k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharded[k])
    for k, s in shapes.items()
  }
  rows = {row[0]: row for row in sharding_table(abstract)}
  assert rows["image/blocks/mlp/fc1/kernel"][3] == 2 * 16 * 64 * 4 // 4


class Fake:
  """A stand-in for a device of another machine."""

  platform, device_kind = "fake", "fake"

  def __init__(self, index, process, part):
    self.id, self.process_index, self.slice_index = index, process, part

  def __repr__(self):
    return f"{self.slice_index}.{self.id}"


def fakes(count=8, slices=2):
  size = count // slices
  # In a different order, as no order is guaranteed.
  return [Fake(i, i // 2, i // size) for i in reversed(range(count))]


@pytest.mark.parametrize(
  ("shape", "slices"),
  [
    # Slices are the outer part of `data`, then of `fsdp`.
    (dict(data=-1, fsdp=2), [[0, 0], [0, 0], [1, 1], [1, 1]]),
    (dict(data=1, fsdp=8), [[0] * 4 + [1] * 4]),
    (dict(data=-1, fsdp=4, dcn=dict(data=1, fsdp=2)), [[0, 0, 1, 1]] * 2),
  ],
)
def test_slices_of_devices(shape, slices):
  mesh = make_mesh(shape, fakes())
  part = np.vectorize(lambda d: d.slice_index)(mesh.devices[..., 0])
  np.testing.assert_array_equal(part, slices)


def test_without_slices_dcn_cuts_the_devices_in_order():
  mesh = make_mesh(dict(data=4, fsdp=2, dcn=dict(data=1, fsdp=2)))
  ids = np.vectorize(lambda d: d.id)(mesh.devices[..., 0])
  assert (ids[:, 0] < 4).all() and (ids[:, 1] >= 4).all()


UNEVEN = [Fake(i, 0, int(i > 4)) for i in range(8)]


@pytest.mark.parametrize(
  ("shape", "devices", "message"),
  [
    (dict(data=3), None, "8 devices"),
    (dict(data=-1, fsdp=-1), None, "8 devices"),
    (dict(data=0), None, "8 devices"),
    (dict(data=-1, tensors=2), None, "Did you mean 'tensor'"),
    (dict(data=-1, dcn=dict(dta=2)), None, "mesh.dcn: no axis 'dta'"),
    (
      dict(data=1, fsdp=8, dcn=dict(data=2)),
      fakes(),
      "data=1 can't be split over dcn.data=2",
    ),
    (
      dict(data=-1, dcn=dict(data=3)),
      fakes(),
      "mesh.dcn: .*multiply to 2 slices",
    ),
    (dict(data=-1), UNEVEN, r"\[5, 3\] devices"),
  ],
)
def test_invalid_meshes_are_rejected(shape, devices, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(shape, devices)


def test_data_rows_follow_a_process_s_devices():
  # Hosts of 2 x 2 chips on a mesh of 4 x 2: rows of chips have two hosts.
  processes = [0, 1, 0, 1, 2, 3, 2, 3]
  devices = np.array([Fake(i, p, 0) for i, p in enumerate(processes)])
  mesh = jax.sharding.Mesh(devices.reshape(8, 1, 1), MESH_AXES)
  actual = data_rows(16, mesh)
  expected = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
  np.testing.assert_array_equal(actual, expected)
  assert find_host_rows(mesh) == HostRows(index=0, count=4)
  odd = jax.sharding.Mesh(
    np.array([Fake(i, int(i > 4), 0) for i in range(8)]).reshape(8, 1, 1),
    MESH_AXES,
  )
  with pytest.raises(ValueError, match="2 processes would hold"):
    data_rows(16, odd)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((2, 4, 1), P(None, "fsdp")),
    ((2, 2, 2), P(None, ("fsdp", "tensor"))),
    ((8, 1, 1), P(None, "tensor")),
  ],
  ids=str,
)
def test_prototypes_are_split_over_whatever_there_is(shape, spec):
  sizes = dict(zip(MESH_AXES, shape, strict=True))
  mesh = make_mesh(sizes)
  name = "heads/dino/last_layer/kernel"
  tree = {name: jax.ShapeDtypeStruct((4, 16), jnp.float32)}
  assert tree_shardings(tree, mesh)[name].spec == spec


def test_check_param_rules():
  """If `fsdp` is gathered, `tensor` must be laid out as the layers use it."""
  name = "image/blocks/mlp/fc1/kernel"
  abstract = {name: jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)}
  both = make_mesh(dict(data=2, fsdp=2, tensor=2))
  moved = [("mlp/fc1/kernel$", (None, ("fsdp", "tensor")))]
  check_param_rules(abstract, both, moved)
  odd = [("mlp/fc1/kernel$", ("tensor", "fsdp"))]
  with pytest.raises(ValueError, match=r"fc1/kernel over tensor as .*fsdp=1"):
    check_param_rules(abstract, both, odd)
  check_param_rules(abstract, both, odd, keep="fc1")
  for shape in (dict(fsdp=8), dict(tensor=8)):
    check_param_rules(abstract, make_mesh(shape), odd)


def test_constrain_batch_and_all_gather_params():
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  params = {
    "mlp/fc1/kernel": jnp.ones((16, 64)),
    "stack/mlp/fc1/kernel": jnp.ones((16, 64)),
    "norm/scale": jnp.ones(16),
  }
  params = jax.device_put(params, tree_shardings(params, mesh))

  @jax.jit
  def used(params, rows):
    sharded = all_gather_params(
      params, mesh, keep="^stack/", dtype=jnp.bfloat16
    )
    return sharded, constrain_batch(rows, mesh)

  sharded, rows = used(params, jnp.ones((8, 6)))
  kernel = sharded["mlp/fc1/kernel"]
  assert kernel.dtype == jnp.bfloat16
  assert kernel.sharding.shard_shape(kernel.shape) == (16, 32)
  assert sharded["norm/scale"].dtype == jnp.float32
  left = sharded["stack/mlp/fc1/kernel"]
  assert left.dtype == jnp.float32
  assert left.sharding.shard_shape(left.shape) == (8, 32)
  assert rows.sharding.shard_shape(rows.shape) == (2, 6)
