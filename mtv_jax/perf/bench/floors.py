"""What a machine can do at all, measured in the run that is judged by it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtv_jax.parallel.mesh import BATCH_SPEC, make_mesh

_CHUNK = 1 << 24


def timed(function: Callable[[], Any], *, rounds: int = 3) -> list[float]:
  """Seconds of each of some calls, after one that is not counted."""
  jax.block_until_ready(function())
  times = []
  for _ in range(rounds):
    begin = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - begin)
  return times


def matmul_peak(dtype: str, *, side: int | None = None) -> float:
  """FLOP a second of large matrix products, on all devices at once.

  The best of some rounds: what disturbs one makes it slower, never faster.

  Args:
    dtype: of the factors and the product.
    side: of the square matrices; by default one that a device is busy with for
      a while.
  """
  if side is None:
    side = 1536 if jax.default_backend() == "cpu" else 8192
  mesh = make_mesh({"data": -1})
  place = jax.sharding.NamedSharding(mesh, BATCH_SPEC)
  shape = (mesh.size, side, side)
  x = jax.jit(lambda: jnp.ones(shape, dtype), out_shardings=place)()
  product = jax.jit(lambda a, b: a @ b)
  times = timed(lambda: product(x, x), rounds=5)
  return 2.0 * mesh.size * side**3 / min(times)


@dataclasses.dataclass(frozen=True)
class Disk:
  """Bytes a second of one file: written to the disk, and read from it."""

  write: float
  read: float


def disk_speed(folder: str | os.PathLike, *, size: int = 1 << 28) -> Disk:
  """Writes a file of random bytes, and reads it.

  Writing ends when the system says that the bytes are on the disk (fsync);
  reading begins with none of them in its memory, as far as it lets go of them.

  Args:
    folder: on the disk in question.
    size: of the file in bytes.
  """
  data = np.random.default_rng(0).integers(0, 256, _CHUNK, np.uint8).tobytes()
  path = pathlib.Path(folder) / "speed.bin"
  count = max(size // _CHUNK, 1)
  try:
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
      for _ in range(count):
        file.write(data)
      os.fsync(file.fileno())
    written = time.perf_counter() - begin
    forget(path)
    begin = time.perf_counter()
    with path.open("rb", buffering=0) as file:
      while file.read(_CHUNK):
        pass
    read = time.perf_counter() - begin
  finally:
    path.unlink(missing_ok=True)
  return Disk(count * _CHUNK / written, count * _CHUNK / read)


def forget(path: pathlib.Path) -> int:
  """Has the system drop its copy of a file, or of a folder's files.

  Returns:
    Their bytes.
  """
  files = [p for p in (path, *path.rglob("*")) if p.is_file()]
  for file in files:
    with file.open("rb") as opened:
      os.fsync(opened.fileno())
      if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  return sum(file.stat().st_size for file in files)


def devices() -> str:
  """Kind and number of the devices."""
  return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
