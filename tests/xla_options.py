"""XLA's options in tests, which compile far longer than they compute."""

import importlib.metadata

# Without the emitters of fusions a step compiles in a third of the time, and
# small gradients differ by up to 4e-3 from one program to another. Releases
# after 0.10 lack the option.
_OPTIONAL = importlib.metadata.version("jaxlib").startswith("0.10.")
# For `jax.jit`, if a test compares two programs to the last digits.
EXACT = {"xla_cpu_use_fusion_emitters": True} if _OPTIONAL else {}


def xla_flags(devices: int, exact: bool = False) -> str:
  """`XLA_FLAGS` for so many CPU devices and the quickest compilation."""
  flags = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  ]
  if _OPTIONAL and not exact:
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)
