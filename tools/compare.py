"""`mtv-jax compare`: compare encoders side by side on a page."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("compare"))
