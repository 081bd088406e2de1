"""XLA compiler options for CPUs, and JAX's persistent compilation cache."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import pathlib

import jax
from jax.sharding import Mesh

from mtv_jax.utils import path as path_lib

log = logging.getLogger(__name__)


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
  """Options for `jax.jit` of a program on a mesh; None if none are needed.

  With YNNPACK's matrix products, the default of newer releases, towers are 1.25
  times slower than with Eigen's, and several times on shared cores.

  Args:
    mesh: None for JAX's default device.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  return _options() if device.platform == "cpu" else None


@functools.cache
def _options() -> dict[str, str] | None:
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None  # A release without this option.
  return options


def enable_compilation_cache(choice: str, workdir: str | os.PathLike) -> None:
  """Enables the compilation cache, so that a resumed run starts at once.

  All hosts share it, also those that replace preempted ones: process 0 writes,
  every process reads. Compiled programs are code: use only folders that other
  users can't write to. `JAX_COMPILATION_CACHE_DIR` takes precedence over
  "auto".

  Args:
    choice: "auto" for `workdir/compiled`, but no cache on CPUs, where
      compilation is short; "none" for no cache; else a folder or
      a URL.
    workdir: the run's folder.
  """
  if choice == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if choice == "auto":
    given = jax.config.jax_compilation_cache_dir
    if given or jax.default_backend() == "cpu":
      return
    choice = os.path.join(workdir, "compiled")
  folder = path_lib.as_path(choice)
  if not path_lib.is_remote(folder):
    folder = pathlib.Path(choice).absolute()
    folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  log.info("Compilation cache: %s.", folder)


# Parameters of glibc's `mallopt` (malloc.h), and the largest value of each.
_TRIM_THRESHOLD, _TOP_PAD = (-1, 2**31 - 1), (-2, 2**26)
_MMAP_THRESHOLD = (-3, 2**25)


def retain_freed_memory() -> None:
  """Makes the C library keep freed memory for the next step of a CPU.

  XLA allocates the buffers of a step anew. By default glibc returns large ones
  to the system, and a third of a small model's training is page faults: 98 ms
  of processor time for a step of the contrast of `configs/study.py` before, 62
  after. Has no effect with other C libraries.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    for parameter, value in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD):
      mallopt(parameter, value)
