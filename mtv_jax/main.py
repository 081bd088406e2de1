"""`python -m mtv_jax.main --config=... --workdir=...`: `mtv-jax train`."""

import sys

from mtv_jax.cli.main import run_command


def main() -> int:
  """Trains by the arguments of the process; returns the exit status."""
  return run_command("train")


if __name__ == "__main__":
  sys.exit(main())
