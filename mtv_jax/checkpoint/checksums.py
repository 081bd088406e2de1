"""Sharding-independent checksums of a checkpoint's arrays.

The checksum of an array is two sums modulo 2^32 over its elements. Each term
mixes an element's bits with its index in the whole array (modulo 2^32). The mix
is a bijection of the bits. Hence

  - any change to a single element of up to 4 bytes is always detected,
  - any other change, such as swapped, shifted or lost elements, goes undetected
    with a probability of about 2^-64,
  - swapped arrays are detected, because checksums are stored by name, with
    dtype and shape.

Sums are order-independent: each device sums its shard, and the total does not
depend on the mesh. Bits are compared, not values: 0.0 differs from -0.0.

The mixing function is the finalizer of MurmurHash3 (Appleby 2011), with its own
constants and with the constants of `lowbias32` (Wellons 2018). The sum is our
choice.
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

# For each sum: (index factor, shift, factor, shift, factor, shift).
_MIXERS = (
  (0x9E3779B1, 16, 0x85EBCA6B, 13, 0xC2B2AE35, 16),
  (0x85EBCA77, 16, 0x7FEB352D, 15, 0x846CA68B, 16),
)
_CHUNK = 1 << 17  # Elements per chunk; its temporaries fit the cache.

Flat = Mapping[str, jax.Array | np.ndarray]


def describe_arrays(arrays: Flat) -> dict[str, str]:
  """Dtype, shape and checksum by name, as 'float32[6,8] 0123456789abcdef'.

  Every process must pass the same names. Arrays in host memory are summed on
  the host, others on their devices.
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
    # One program for all arrays waits for the devices once.
    device_sums = _sum_on_devices([arrays[name] for name in names])
    sums |= dict(zip(names, device_sums, strict=True))
  return {
    name: f"{describe(x)} {sums[name][0]:08x}{sums[name][1]:08x}"
    for name, x in arrays.items()
  }


def describe(x: Any) -> str:
  """Dtype and shape of an array or a `ShapeDtypeStruct`: 'float32[6,8]'."""
  return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def _on_host(x: jax.Array) -> bool:
  platforms = {device.platform for device in x.sharding.device_set}
  return platforms == {"cpu"} and x.is_fully_addressable


def _mix(bits: Any, index: Any, mixer: Sequence[int]) -> Any:
  """The terms of one sum, from uint32 NumPy or JAX arrays."""
  u32 = np.uint32
  factor, shift1, factor1, shift2, factor2, shift3 = mixer
  # The constant gives a zero at index 0 a term other than 0.
  bits = bits ^ (index * u32(factor) + u32(factor2))
  # Augmented assignments run in place in NumPy.
  bits ^= bits >> u32(shift1)
  bits *= u32(factor1)
  bits ^= bits >> u32(shift2)
  bits *= u32(factor2)
  bits ^= bits >> u32(shift3)
  return bits


def _word_dtype(dtype: np.dtype) -> np.dtype:
  """Unsigned type of an element's bits; uint32 halves for 8-byte elements."""
  return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def _sum_on_host(x: np.ndarray) -> np.ndarray:
  words = np.ascontiguousarray(x).reshape(-1).view(_word_dtype(x.dtype))
  sum_chunk = functools.partial(_sum_chunk, words)
  starts = range(0, words.size, _CHUNK)
  if len(starts) < 2:
    chunks = map(sum_chunk, starts)
  else:
    chunks = _thread_pool().map(sum_chunk, starts)
  zero = np.zeros(len(_MIXERS), np.uint32)
  return functools.reduce(np.add, chunks, zero)


def _sum_chunk(words: np.ndarray, start: int) -> np.ndarray:
  bits = words[start : start + _CHUNK].astype(np.uint32)
  index = np.arange(start, start + bits.size, dtype=np.uint64)
  index = index.astype(np.uint32)
  return np.stack(
    [np.sum(_mix(bits, index, m), dtype=np.uint32) for m in _MIXERS]
  )


@functools.cache
def _thread_pool() -> concurrent.futures.ThreadPoolExecutor:
  # NumPy releases the GIL in its loops.
  return concurrent.futures.ThreadPoolExecutor(thread_name_prefix="checksum")


def _sum_on_devices(arrays: Sequence[jax.Array]) -> np.ndarray:
  """The sums, [N, 2], of N arrays that share their devices."""
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
  """The sums of one array, uint32 [2], on its devices."""
  word = _word_dtype(x.dtype)
  if x.dtype == jnp.bool_:
    x = x.astype(word)
  # Elements of 8 bytes become two words along a new last axis.
  bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
    axis_index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index + axis_index * stride
  return jnp.stack(
    [jnp.sum(_mix(bits, index, m), dtype=jnp.uint32) for m in _MIXERS]
  )
