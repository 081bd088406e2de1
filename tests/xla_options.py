"""XLA's options in tests, which compile far longer than they compute."""

import importlib.metadata


def xla_flags(devices: int) -> str:
  """`XLA_FLAGS` for so many CPU devices and the quickest compilation."""
  flags = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
  ]
  # A third of the time to compile. Later releases don't know the option.
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)
