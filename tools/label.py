"""`mtv-jax label`: label shards with an expert model."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("label"))
