"""A compiled train step in a file: preflight saves it, a run loads it.

A file is a line of JSON, which says what the program depends on, followed by
the program, as `jax.experimental.serialize_executable` writes it.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from mtv_jax.config import overrides
from mtv_jax.parallel.distributed import gather_json
from mtv_jax.train.build_step import TrainStep
from mtv_jax.train.runtime import sessions
from mtv_jax.utils import path as path_lib
from mtv_jax.utils import xla_flags
from mtv_jax.utils.errors import InputError, MissingFileError
from mtv_jax.utils.text import list_first

log = logging.getLogger(__name__)

_FORMAT = "mtv_jax compiled train step 1"
# Config keys that the step depends on only through its arguments or not at all.
# The run's length is compared in steps.
_NOT_COMPARED = {
  "data", "evals", "checkpoint", "log", "nonfinite", "watchdog", "interference",
  "weights", "init", "total_steps", "total_epochs", "total_examples", "seed",
}  # fmt: skip
_JAX_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu")


def list_dependencies(step: TrainStep) -> dict[str, Any]:
  """What the compiled step depends on, as JSON."""
  config = step.config.to_dict()
  config = {k: v for k, v in config.items() if k not in _NOT_COMPARED}
  model = config["model"] | {"remat": str(step.step_spec.remat)}
  if text := model.get("text"):
    text = {k: v for k, v in text.items() if k not in ("tokenizer", "clean")}
  config["model"] = model | {"text": text}
  devices, versions = step.mesh.devices.ravel(), sessions.package_versions()
  is_cpu = devices[0].platform == "cpu"
  dependencies = {
    "config": config,
    "total_steps": step.total_steps,
    "in_lanes": step.step_spec.in_lanes,
    "batch": {
      name: f"{leaf.shape} {leaf.dtype}"
      for name, leaf in step.abstract_batch().items()
    },
    "devices": {
      "kind": devices[0].device_kind,
      "order": [device.id for device in devices],
      "hosts": len({device.process_index for device in devices}),
      "mesh": dict(step.mesh.shape),
      # Programs for a CPU may use any instruction of its processor.
      "processor": xla_flags.processor_name() if is_cpu else None,
    },
    "compiler_options": xla_flags.compiler_options(
      step.mesh, step.program.flags
    ),
    "flags": xla_flags.environment_flags(),
    "jax": {name: getattr(jax.config, name) for name in _JAX_OPTIONS},
    "code": sessions.code_digest(config),
    "versions": {
      name: versions.get(name)
      for name in _PACKAGES
      if name != "libtpu" or devices[0].platform == "tpu"
    },
  }
  if "_epochs" in json.dumps(config):  # Steps then depend on the data.
    dependencies["examples_per_epoch"] = step.length.examples_per_epoch
  return json.loads(json.dumps(dependencies))


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Disables JAX's cache, since CPU programs from it can't be saved again."""
  name = "jax_enable_compilation_cache"
  old = getattr(jax.config, name)
  try:
    jax.config.update(name, False)
    compilation_cache.reset_cache()
    yield
  finally:
    jax.config.update(name, old)
    compilation_cache.reset_cache()


def save(
  path: str | os.PathLike, step: TrainStep, program: jax.stages.Compiled
) -> int:
  """Writes the update of all objectives, compiled `without_cache`.

  Returns the size of the file in bytes.
  """
  content, _, out_tree = serialize_executable.serialize(program)
  _, metrics = out_tree.unflatten([0] * out_tree.num_leaves)
  header = {
    "format": _FORMAT,
    "depends_on": list_dependencies(step),
    "metrics": sorted(metrics),
    "digest": hashlib.blake2b(content).hexdigest(),
  }
  data = json.dumps(header).encode() + b"\n" + content
  path_lib.write_bytes(path_lib.as_path(path), data)
  return len(data)


def load_if_compatible(path: str | os.PathLike, step: TrainStep) -> TrainStep:
  """Loads a file's program into a step if it was compiled for such a step.

  Otherwise, or if JAX can't load it, logs why and returns the step unchanged.
  Collective: all processes load it, or none. Raises InputError for a file of
  another format, MissingFileError for a missing file.
  """
  header, content = _read_file(path)
  differences = overrides.describe_difference(
    header["depends_on"], list_dependencies(step)
  )
  reason = list_first(differences, 3)
  executable = None
  if not reason:
    try:
      executable = _load_program(content, header["metrics"], step)
    except Exception as error:  # JAX can raise any exception.
      reason = f"{type(error).__name__}: {str(error)[:200]}"
  reasons = list(filter(None, gather_json(reason)))
  if reasons:
    log.warning(f"The step in {path} does not match ({reasons[0]}); compiling.")
    return step
  log.info(f"Loaded the compiled step from {path}.")
  program = dataclasses.replace(step.program, loaded=executable)
  return dataclasses.replace(step, program=program)


def _read_file(path: str | os.PathLike) -> tuple[dict[str, Any], bytes]:
  """Header and program of a file; does not load the program."""
  if not path_lib.is_file(path):
    raise MissingFileError(
      f"--compiled={path}: there is no such file; `mtv-jax preflight --save`"
      " writes it."
    )
  line, _, content = path_lib.read_bytes(path_lib.as_path(path)).partition(
    b"\n"
  )
  try:
    header = json.loads(line)
  except ValueError:
    header = None
  if not isinstance(header, dict) or header.get("format") != _FORMAT:
    raise InputError(
      f"{path} is not a compiled train step; `mtv-jax preflight --save` writes"
      " them."
    )
  if header["digest"] != hashlib.blake2b(content).hexdigest():
    raise InputError(
      f"{path} is damaged: its program differs from the one saved. Save it"
      " again, or copy it again."
    )
  return header, content


def _load_program(
  content: bytes, metrics: list[str], step: TrainStep
) -> jax.stages.Compiled:
  state, devices = step.program.abstract, step.mesh.devices.ravel()
  in_tree = jax.tree.structure(((0, state, step.abstract_batch()), {}))
  out_tree = jax.tree.structure((state, dict.fromkeys(metrics, 0)))
  return serialize_executable.deserialize_and_load(
    content,
    in_tree,
    out_tree,
    backend=devices[0].client,
    execution_devices=devices.tolist(),
  )
