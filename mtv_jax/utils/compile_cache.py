"""JAX's persistent compilation cache in a run's folder."""

from __future__ import annotations

import logging
import os
import pathlib

import jax

log = logging.getLogger(__name__)

FOLDER = "compiled"


def enable(choice: str, workdir: str | os.PathLike) -> pathlib.Path | None:
  """Enables the compilation cache, so that a resumed run starts at once.

  All hosts share it in the run's folder, also those that replace preempted
  ones: process 0 writes, every process reads. Compiled programs are code: give
  only folders that other users can't write to.

  `JAX_COMPILATION_CACHE_DIR` takes precedence over "auto".

  Args:
    choice: "auto" for `workdir/compiled`, but no cache on CPUs, where
      compilation is short; "none" for no cache; else a folder.
    workdir: of the run.

  Returns:
    The folder; None for no cache, or one that the environment variable names.
  """
  if choice == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  if choice == "auto":
    given = jax.config.jax_compilation_cache_dir
    # `build_experiment` refuses a bucket as the run's folder.
    if given or jax.default_backend() == "cpu" or "://" in str(workdir):
      return None
    folder = pathlib.Path(workdir) / FOLDER
  else:
    folder = pathlib.Path(choice)
  folder = folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  log.info("Compilation cache: %s.", folder)
  return folder
