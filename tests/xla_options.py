"""XLA's options in tests, which compile far longer than they compute."""


def xla_flags(devices: int) -> str:
  """`XLA_FLAGS` for so many CPU devices and LLVM's cheapest code."""
  return (
    f"--xla_force_host_platform_device_count={devices}"
    " --xla_backend_optimization_level=0"
  )
