"""`mtv-jax make_shards`: write shards of images and captions."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("make_shards"))
