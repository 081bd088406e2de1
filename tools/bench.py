"""`mtv-jax bench`: benchmarks against limits of this machine."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("bench"))
