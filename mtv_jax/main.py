"""`python -m mtv_jax.main --config=... --workdir=...`: `mtv-jax train`."""

import sys

from mtv_jax.cli.main import run_command

if __name__ == "__main__":
  sys.exit(run_command("train"))
