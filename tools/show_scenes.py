"""`mtv-jax show_scenes`: draw built-in scenes with their labels."""

import sys

from mtv_jax.cli.main import command

main = command("show_scenes")

if __name__ == "__main__":
  sys.exit(main())
