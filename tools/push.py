"""`mtv-jax push`: upload an export to the Hugging Face hub."""

import sys

from mtv_jax.cli.main import command

main = command("push")

if __name__ == "__main__":
  sys.exit(main())
