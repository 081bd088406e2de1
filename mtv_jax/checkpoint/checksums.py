"""Checksums of the arrays of a checkpoint, independent of their sharding.

The checksum of an array is two sums modulo 2^32 over its elements. A term mixes
the bits of an element with its index in the whole array, by a function that is
a bijection of the bits. Hence

  - a change of one element of up to 4 bytes, of any number of bits, is always
    detected,
  - any other change, such as swapped, shifted or lost elements, goes undetected
    with a probability of about 2^-64,
  - swapped arrays are detected, as checksums are stored by name, with dtype and
    shape.

Sums need no order: each device adds up its shard, and the total is that of any
other mesh. Bits are compared, not values: 0.0 differs from -0.0. An index
counts modulo 2^32.

The mixing function is the finalizer of MurmurHash3 (Appleby 2011), with its own
constants and with those of `lowbias32` (Wellons 2018); the sum is our choice.
"""

import concurrent.futures
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# (factor of the index, shift, factor, shift, factor, shift) of the two sums.
_MIXERS = (
  (0x9E3779B1, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
  (0x85EBCA77, 16, 0x7FEB352D, 15, 0x846CA68B, 16),
)
_CHUNK = 1 << 17  # Elements: their temporaries stay in the cache.

Flat = Mapping[str, jax.Array | np.ndarray]


def describe_arrays(arrays: Flat) -> dict[str, str]:
  """Dtype, shape and checksum by name, as 'float32[6,8] 0123456789abcdef'.

  Every process calls it with the same names. Arrays in the memory of this
  process are read there; others are summed by the devices that have them.
  """
  sums = {}
  by_devices: dict[Any, list[str]] = {}
  for name, x in arrays.items():
    if isinstance(x, np.ndarray) or _on_host(x):
      sums[name] = _sum_on_host(np.asarray(x))
    else:
      devices = frozenset(x.sharding.device_set)
      by_devices.setdefault(devices, []).append(name)
  for names in by_devices.values():
    # One program for all: it waits for the devices once.
    total = _sum_on_devices([arrays[name] for name in names])
    sums |= dict(zip(names, total, strict=True))
  return {
    name: f"{describe(x)} {sums[name][0]:08x}{sums[name][1]:08x}"
    for name, x in arrays.items()
  }


def describe(x: Any) -> str:
  """Dtype and shape of an array or of its description: 'float32[6,8]'."""
  return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def _on_host(x: jax.Array) -> bool:
  """Whether this process has the whole array in main memory."""
  platforms = {device.platform for device in x.sharding.device_set}
  return platforms == {"cpu"} and x.is_fully_addressable


def _mix(bits: Any, index: Any, mixer: Sequence[int]) -> Any:
  """The terms of a sum; of NumPy or JAX arrays, uint32."""
  u32 = np.uint32
  factor, shift1, factor1, shift2, factor2, shift3 = mixer
  # The constant keeps zeros at the start of an array from adding 0.
  bits = bits ^ (index * u32(factor) + u32(factor2))
  # In place in NumPy.
  bits ^= bits >> u32(shift1)
  bits *= u32(factor1)
  bits ^= bits >> u32(shift2)
  bits *= u32(factor2)
  bits ^= bits >> u32(shift3)
  return bits


def _word(dtype: np.dtype) -> np.dtype:
  """The unsigned type of an element's bits, of half an element of 8 bytes."""
  return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def _sum_on_host(x: np.ndarray) -> np.ndarray:
  words = np.ascontiguousarray(x).reshape(-1).view(_word(x.dtype))

  def sum_chunk(start: int) -> np.ndarray:
    bits = words[start : start + _CHUNK].astype(np.uint32)
    index = np.arange(start, start + bits.size, dtype=np.uint64)
    index = index.astype(np.uint32)
    return np.stack(
      [np.sum(_mix(bits, index, m), dtype=np.uint32) for m in _MIXERS]
    )

  starts = range(0, words.size, _CHUNK)
  if len(starts) < 2:
    chunks = map(sum_chunk, starts)
  else:
    chunks = _threads().map(sum_chunk, starts)
  zero = np.zeros(len(_MIXERS), np.uint32)
  return functools.reduce(np.add, chunks, zero)


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  # NumPy releases the interpreter's lock in its loops.
  return concurrent.futures.ThreadPoolExecutor(thread_name_prefix="checksum")


def _sum_on_devices(arrays: Sequence[jax.Array]) -> np.ndarray:
  """The sums of each array, [N, 2], of arrays on the same devices."""
  meshes = [
    x.sharding.mesh for x in arrays if isinstance(x.sharding, NamedSharding)
  ]
  # Every process reads the sums.
  replicated = NamedSharding(meshes[0], P()) if meshes else None
  return np.asarray(_compile_sums(replicated)(list(arrays)))


@functools.cache
def _compile_sums(sharding: NamedSharding | None) -> Any:
  return jax.jit(
    lambda arrays: jnp.stack([_sum(x) for x in arrays]), out_shardings=sharding
  )


def _sum(x: jax.Array) -> jax.Array:
  """The sums of one array, uint32 [2], on the devices that have it."""
  word = _word(x.dtype)
  if x.dtype == jnp.bool_:
    x = x.astype(word)
  # Elements of 8 bytes become two words along a new last axis.
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
    along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index + along * stride
  return jnp.stack(
    [jnp.sum(_mix(bits, index, m), dtype=jnp.uint32) for m in _MIXERS]
  )
