"""`mtv-jax config`: print a resolved config, or what differs between two."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("config"))
