"""`mtv-jax inspect_labels`: sheet, page and statistics of label sets."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("inspect_labels"))
