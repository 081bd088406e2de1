"""`mtv-jax report`: report runs on one page."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("report"))
