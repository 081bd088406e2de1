"""Checksums: equal on every mesh and in NumPy, and what they detect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtv_jax.checkpoint import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def make_array(dtype, shape=(8, 6, 3)):
  values = np.random.default_rng(0).normal(size=shape) * 50
  if dtype == "bool":
    return values > 0
  return np.abs(values).astype(jnp.dtype(dtype))


def put(x, count, *spec):
  mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])
  return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def describe(x):
  return checksums.describe_arrays({"x": x})["x"]


def finalize(h, shift1, factor1, shift2, factor2, shift3):
  h = (h ^ h >> shift1) * factor1 % 2**32
  h = (h ^ h >> shift2) * factor2 % 2**32
  return h ^ h >> shift3


def sums_in_integers(words):
  """The definition, in Python's integers."""
  mixers = [
    (0x9E3779B1, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
    (0x85EBCA77, 16, 0x7FEB352D, 15, 0x846CA68B, 16),
  ]
  return [
    sum(
      finalize(int(word) ^ (i * factor + rest[3]) % 2**32, *rest)
      for i, word in enumerate(words)
    )
    % 2**32
    for factor, *rest in mixers
  ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_devices_and_hosts_agree(dtype):
  """Also the sums of devices, which this host would otherwise compute."""
  x = make_array(dtype)
  kind = np.dtype(f"uint{8 * x.dtype.itemsize}")
  expected = sums_in_integers(x.reshape(-1).view(kind))
  text = f"{dtype}[8,6,3] {expected[0]:08x}{expected[1]:08x}"
  for y in (x, jnp.asarray(x), put(x, 8, "x"), put(x, 2, None, "x")):
    assert describe(y) == text
  eight = [put(x, 8, "x"), put(x, 8, None)]
  two = [put(x, 2, None, "x"), put(x, 2, "x")]
  for arrays in (eight, two):
    sums = checksums._sum_on_devices(arrays)
    np.testing.assert_array_equal(sums, [expected, expected])


def test_scalars_empty_arrays_large_arrays_and_eight_bytes():
  assert describe(np.zeros((0, 3), np.float32)).endswith(" " + 16 * "0")
  scalar = np.array(3.5, np.float32)
  expected = sums_in_integers(scalar.reshape(1).view(np.uint32))
  assert describe(scalar) == f"float32[] {expected[0]:08x}{expected[1]:08x}"
  long = np.arange(5, dtype=np.int64) << 33
  expected = sums_in_integers(long.view(np.uint32))
  assert describe(long) == f"int64[5] {expected[0]:08x}{expected[1]:08x}"
  # Several chunks; the last is partial.
  large = np.random.default_rng(1).normal(size=3 * checksums._CHUNK - 7)
  large = large.astype(np.float32)
  sums = checksums._sum_on_devices([jnp.asarray(large)])
  assert describe(large).endswith(f" {sums[0][0]:08x}{sums[0][1]:08x}")


def test_every_flipped_bit_and_every_swap_changes_the_checksum():
  x = np.linspace(0, 1, 16, dtype=np.float32)
  seen = {describe(x)}
  for i in range(16):
    for bit in range(32):
      y = x.copy()
      y.view(np.uint32)[i] ^= np.uint32(1 << bit)
      seen.add(describe(y))
    for j in range(i):
      y = x.copy()
      y[[i, j]] = y[[j, i]]
      seen.add(describe(y))
  # Powers of two differ by multiples of 2^23, where linear sums are weak.
  x = 2.0 ** np.arange(16, dtype=np.float32)
  for i in range(16):
    for j in range(i):
      y = x.copy()
      y[[i, j]] = y[[j, i]]
      seen.add(describe(y))
  assert len(seen) == 1 + 16 * 32 + 2 * 120
  assert describe(np.float32([0.0])) != describe(np.float32([-0.0]))
  assert describe(np.zeros(3)) != describe(np.zeros(4))


def test_arrays_of_several_meshes_are_described_together(monkeypatch):
  monkeypatch.setattr(checksums, "_on_host", lambda x: False)
  x = make_array("float32")
  arrays = {"a": put(x, 8, "x"), "b": put(x + 1, 2, "x"), "c": x}
  expected = {k: describe(np.asarray(v)) for k, v in arrays.items()}
  assert checksums.describe_arrays(arrays) == expected
