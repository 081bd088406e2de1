"""`mtv-jax make_prompts`: write ImageNet's class names and prompts."""

import sys

from mtv_jax.cli.main import command

main = command("make_prompts")

if __name__ == "__main__":
  sys.exit(main())
