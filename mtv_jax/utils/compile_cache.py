"""Compiled programs kept on disk, so that a run that goes on starts at once."""

from __future__ import annotations

import logging
import os
import pathlib

import jax

log = logging.getLogger(__name__)

FOLDER = "compiled"


def enable(choice: str, workdir: str | os.PathLike) -> pathlib.Path | None:
  """Has JAX keep what it compiles, and look there first.

  In the run's folder all hosts find it, also those that replace preempted
  ones: process 0 writes, everyone reads. Compiled programs are code: as a
  folder to take them from, name only one that nobody else may write to.

  `JAX_COMPILATION_CACHE_DIR`, if set, is left to say where.

  Args:
    choice: "auto" keeps them in `workdir/compiled`, but not on a CPU, where
      compilation is short; "none" keeps nothing; anything else is a folder.
    workdir: of the run.

  Returns:
    The folder; None where nothing is kept, or the environment says where.
  """
  if choice == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  if choice == "auto":
    told = jax.config.jax_compilation_cache_dir
    # A run that names a bucket as its folder is about to be refused.
    if told or jax.default_backend() == "cpu" or "://" in str(workdir):
      return None
    folder = pathlib.Path(workdir) / FOLDER
  else:
    folder = pathlib.Path(choice)
  folder = folder.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  log.info("Compiled programs are kept in %s.", folder)
  return folder
