"""What makes XLA fast where the devices are a CPU."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh


def compiler_options(mesh: Mesh | None) -> dict[str, str] | None:
  """Options for `jax.jit` of a program on a mesh; None where none are needed.

  YNNPACK's matrix products, XLA's choice of late, made towers 1.25 times slower
  than Eigen's, and several times where the cores are shared.

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
    return None  # A version that has no such option.
  return options
