"""`mtv-jax evaluate`: evaluate encoders and write a report."""

import sys

from mtv_jax.cli.main import command

main = command("evaluate")

if __name__ == "__main__":
  sys.exit(main())
