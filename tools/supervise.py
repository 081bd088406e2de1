"""`mtv-jax supervise`: restart a training command until it is done."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("supervise"))
