"""XLA's options in tests, which compile far longer than they compute."""

import importlib.metadata


def xla_flags(devices: int) -> str:
  """`XLA_FLAGS` for so many CPU devices and LLVM's cheapest code."""
  flags = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
  ]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitters compile a train step in less than half of the time;
    # JAX 0.12 has the newer ones alone.
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)
