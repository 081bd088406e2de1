"""`mtv-jax make_labels`: write label sets from annotations."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("make_labels"))
