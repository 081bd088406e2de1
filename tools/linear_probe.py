"""`mtv-jax linear_probe`: linear classification."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("linear_probe"))
