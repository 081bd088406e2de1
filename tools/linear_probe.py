"""`mtv-jax linear_probe`: linear classification."""

import sys

from mtv_jax.cli.main import command

main = command("linear_probe")

if __name__ == "__main__":
  sys.exit(main())
