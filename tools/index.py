"""`mtv-jax index`: write the table of blocks of shards in a bucket."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("index"))
