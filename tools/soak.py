"""`mtv-jax soak`: memory and step time of a long run."""

import sys

from mtv_jax.cli.main import command

main = command("soak")

if __name__ == "__main__":
  sys.exit(main())
