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
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)


# Named sets of compiler flags for `config.xla_flags`; see `parse_flags`. The
# TPU sets follow MaxText's (benchmarks/xla_flags_library.py); docs/pods.md says
# what they are for.
_FUSION = "xla_tpu_enable_async_collective_fusion"
_ASYNC = (
  f"{_FUSION}=true|{_FUSION}_multiple_steps=true"
  "|xla_tpu_overlap_compute_collective_tc=true|"
)
FLAG_SETS = {
  "async_all_gather": _ASYNC
  + f"{_FUSION}_fuse_all_gather=true|xla_enable_async_all_gather=true",
  "async_all_reduce": _ASYNC
  + f"{_FUSION}_fuse_all_reduce=true|xla_enable_async_all_reduce=true",
  "reduce_scatter": "xla_tpu_use_minor_sharding_for_major_trivial_input=true"
  "|xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
  "data_parallel": "xla_tpu_enable_data_parallel_all_reduce_opt=true"
  "|xla_tpu_data_parallel_opt_different_sized_ops=true",
  "dense_vmem": "xla_tpu_scoped_vmem_limit_kib=98304",
  # Compiles in 0.6 of the time, for runs of a few steps on a CPU.
  "quick": "xla_backend_optimization_level=0",
}

_LEVEL = "xla_backend_optimization_level"
_CPU_FLAGS = (_LEVEL, "xla_cpu_")


def parse_flags(text: str) -> dict[str, str]:
  """Compiler options of `config.xla_flags`; ConfigError if invalid.

  The text is names of `FLAG_SETS` and NAME=VALUE flags, separated by '|'; later
  ones override earlier ones.
  """
  flags: dict[str, str] = {}
  for part in filter(None, map(str.strip, text.split("|"))):
    name, equals, value = part.removeprefix("--").partition("=")
    if equals:
      flags[name] = value
    elif name in FLAG_SETS:
      flags |= parse_flags(FLAG_SETS[name])
    else:
      hint = did_you_mean(name, FLAG_SETS)
      raise ConfigError(
        f"config.xla_flags: {name!r} is neither a flag set nor NAME=VALUE."
        f" {hint}"
      )
  return flags


def select_flags(text: str, platform: str) -> dict[str, str]:
  """The options of `config.xla_flags` for a platform; none apply to GPUs."""
  return {
    name: value
    for name, value in parse_flags(text).items()
    if platform == ("cpu" if name.startswith(_CPU_FLAGS) else "tpu")
  }


def compiler_options(
  mesh: Mesh | None, flags: str = "", *, runs_once: bool = False
) -> dict[str, str] | None:
  """Options for `jax.jit` on a mesh (None: the default device), if needed.

  `flags` is `config.xla_flags`. On CPUs, selects Eigen's matrix products: with
  YNNPACK, the default of newer releases, towers are 1.25 times slower, and
  several times on shared cores. A program that `runs_once` is optimized less on
  CPUs, unless XLA_FLAGS set the level: it compiles twice as fast and computes
  equal values.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  selected = select_flags(flags, device.platform)
  if device.platform != "cpu":
    return selected or None
  if runs_once and _LEVEL not in os.environ.get("XLA_FLAGS", ""):
    return {_LEVEL: "1"}
  return (_probe_cpu_options() or {}) | selected or None


@functools.cache
def _probe_cpu_options() -> dict[str, str] | None:
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return None  # This release lacks the option.
  return options


@contextlib.contextmanager
def silence_slow_compile_alarm() -> Iterator[None]:
  """Hides XLA's alarm about compilations longer than two minutes.

  The alarm asks for a bug report, while `progress` reports the time. Silences
  JAX's loggers too, unless JAX_LOG_COMPILES or JAX_LOGGING_LEVEL is set.
  """
  name = "jax_logging_level"
  old_level = getattr(jax.config, name)
  if old_level not in (None, "NOTSET") or jax.config.jax_log_compiles:
    yield
    return
  jax.config.update(name, "CRITICAL")
  try:
    yield
  finally:
    # "NOTSET" alone would leave the C++ logger's level unchanged.
    jax.config.update(name, "WARNING")
    jax.config.update(name, old_level)


def enable_compilation_cache(choice: str, workdir: str | os.PathLike) -> None:
  """Enables the persistent compilation cache, so that resumed runs start fast.

  All hosts share it, including replacements of preempted ones: process 0
  writes, every process reads. Compiled programs are code: use only folders that
  other users can't write to.

  The choice is a folder, a URL, "none", or "auto": `JAX_COMPILATION_CACHE_DIR`,
  else `workdir/compiled`. On CPUs, uses a subfolder named after the processor,
  since a program may crash on another one. The key of JAX 0.12's cache includes
  the processor's features (`jax._src.cache_key._hash_accelerator_config`);
  older ones may lack them.
  """
  if choice == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return
  if choice == "auto":
    if jax.config.jax_compilation_cache_dir:
      return
    choice = os.path.join(workdir, "compiled")
  if jax.default_backend() == "cpu":
    choice = os.path.join(choice, processor_name())
    # By default programs that compile in less than 1 s are not stored.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  folder = path_lib.as_path(choice)
  if not path_lib.is_remote(folder):
    folder = pathlib.Path(choice).absolute()
    folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  log.info("Compilation cache: %s.", folder)


def processor_name() -> str:
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
