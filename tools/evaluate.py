"""`mtv-jax evaluate`: evaluate encoders and write a report."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("evaluate"))
