"""`mtv-jax study`: runs of a config that are compared with each other."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("study"))
