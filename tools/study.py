"""`mtv-jax study`: runs of a config that are compared with each other."""

import sys

from mtv_jax.cli.main import command

main = command("study")

if __name__ == "__main__":
  sys.exit(main())
