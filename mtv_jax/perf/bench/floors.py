"""Limits of this machine, measured in the run that is compared with them."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh
from mtv_jax.perf.bench import harness

# Bytes written at once, and how often.
_CHUNK, _CHUNKS = 1 << 24, 16


def matmul_peak(dtype: str) -> float:
  """FLOP/s of large matrix products on all devices at once.

  The best of some rounds: disturbances only slow a round down.
  """
  side = 1536 if jax.default_backend() == "cpu" else 8192
  mesh = make_mesh({"data": -1})
  shape = (mesh.size, side, side)
  by_device = NamedSharding(mesh, BATCH_SPEC)
  x = jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=by_device)()
  product = jax.jit(lambda a, b: a @ b)
  times = harness.time_rounds(
    [lambda: jax.block_until_ready(product(x, x))], rounds=5
  )
  return float(2.0 * mesh.size * side**3 / times.min())


def disk_speed(folder: pathlib.Path) -> dict[str, float]:
  """Bytes per second that one file is written ('write') and read ('read') at.

  Writing includes fsync. The file's pages are dropped before it is read, as
  far as the system does that.
  """
  data = np.random.default_rng(0).integers(0, 256, _CHUNK, np.uint8).tobytes()
  path = folder / "speed.bin"
  try:
    with harness.Stopwatch() as write, path.open("wb", buffering=0) as file:
      for _ in range(_CHUNKS):
        file.write(data)
      os.fsync(file.fileno())
    drop_page_cache(path)
    with harness.Stopwatch() as read, path.open("rb", buffering=0) as file:
      while file.read(_CHUNK):
        pass
  finally:
    path.unlink(missing_ok=True)
  total = _CHUNKS * _CHUNK
  return {"write": total / write.wall, "read": total / read.wall}


def drop_page_cache(path: pathlib.Path) -> int:
  """Drops the cached pages of a folder's files; returns their total bytes."""
  files = [p for p in (path, *path.rglob("*")) if p.is_file()]
  for file in files:
    with file.open("rb") as opened:
      os.fsync(opened.fileno())
      if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  return sum(file.stat().st_size for file in files)


def describe_devices() -> str:
  """Number and kind of the devices."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
