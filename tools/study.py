"""`mtv-jax study`: train and compare runs of one config."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("study"))
