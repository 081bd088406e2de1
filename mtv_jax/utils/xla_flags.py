"""XLA compiler options for CPUs, and JAX's persistent compilation cache."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform

import jax
from jax.sharding import Mesh

from mtv_jax.utils import path as path_lib

log = logging.getLogger(__name__)


def compiler_options(
  mesh: Mesh | None, *, once: bool = False
) -> dict[str, str] | None:
  """Options for `jax.jit` on a mesh (None: the default device), if needed.

  Selects Eigen's matrix products on CPUs. With YNNPACK, the default of newer
  releases, towers are 1.25 times slower, and several times on shared cores.
  A program that runs `once` is optimized less on CPUs, unless XLA_FLAGS set
  the level: it compiles twice as fast and computes equal values.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if device.platform != "cpu":
    return None
  name = "xla_backend_optimization_level"
  if once and name not in os.environ.get("XLA_FLAGS", ""):
    return {name: "1"}
  return _options()


@functools.cache
def _options() -> dict[str, str] | None:
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None  # This release lacks the option.
  return options


def enable_compilation_cache(choice: str, workdir: str | os.PathLike) -> None:
  """Enables the persistent compilation cache, so that resumed runs start fast.

  All hosts share it, including replacements of preempted ones: process 0
  writes, every process reads. Compiled programs are code: use only folders that
  other users can't write to.

  The choice is a folder, a URL, "none", or "auto": `JAX_COMPILATION_CACHE_DIR`,
  else `workdir/compiled`. On CPUs a subfolder is named by the processor, since
  a program may crash on another one. The key of JAX 0.12's cache includes the
  processor's features (`jax._src.cache_key._hash_accelerator_config`); older
  ones may lack them.
  """
  if choice == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if choice == "auto":
    if jax.config.jax_compilation_cache_dir:
      return
    choice = os.path.join(workdir, "compiled")
  if jax.default_backend() == "cpu":
    choice = os.path.join(choice, _processor())
    # By default programs that compile in less than 1 s are not stored.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  folder = path_lib.as_path(choice)
  if not path_lib.is_remote(folder):
    folder = pathlib.Path(choice).absolute()
    folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  log.info("Compilation cache: %s.", folder)


def _processor() -> str:
  """Name of this machine's instruction set, such as `x86_64-1f3a9c0d`."""
  lines = []
  with contextlib.suppress(OSError):  # Not on Linux.
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  keys = ("model name", "flags", "Features")
  features = {line for line in lines if line.startswith(keys)}
  text = "\n".join(sorted(features)) or platform.processor()
  digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
  return f"{platform.machine()}-{digest}"


# Parameters of glibc's `mallopt` (malloc.h), with their maximum values.
_TRIM_THRESHOLD, _TOP_PAD = (-1, 2**31 - 1), (-2, 2**26)
_MMAP_THRESHOLD = (-3, 2**25)


def retain_freed_memory() -> None:
  """Makes glibc reuse freed memory across steps on CPUs.

  XLA allocates the buffers of every step anew. By default glibc returns large
  ones to the system, and page faults take a third of a small model's step time:
  a contrastive step of `configs/study.py` took 98 ms of CPU time, now 62 ms.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    for parameter, value in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD):
      mallopt(parameter, value)
