"""`mtv-jax interference`: compare the objectives' gradients of a run."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("interference"))
