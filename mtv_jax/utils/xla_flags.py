"""XLA compiler options for CPUs."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
  """Options for `jax.jit` of a program on a mesh; None where none are needed.

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
