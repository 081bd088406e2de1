"""`mtv-jax plot_run`: plot a run's metrics."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("plot_run"))
