"""`mtv-jax plot_run`: plot a run's metrics."""

import sys

from mtv_jax.cli.main import command

main = command("plot_run")

if __name__ == "__main__":
  sys.exit(main())
