"""`mtv-jax report`: put runs on one page."""

import sys

from mtv_jax.cli.main import command

main = command("report")

if __name__ == "__main__":
  sys.exit(main())
