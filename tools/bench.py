"""`mtv-jax bench`: benchmarks beside limits of this machine."""

import sys

from mtv_jax.cli.main import command

main = command("bench")

if __name__ == "__main__":
  sys.exit(main())
