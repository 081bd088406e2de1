"""`mtv-jax chaos`: kill a run at random moments and compare it."""

import sys

from mtv_jax.cli.main import command

main = command("chaos")

if __name__ == "__main__":
  sys.exit(main())
