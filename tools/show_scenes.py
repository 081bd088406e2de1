"""Draws built-in scenes with their labels: `mtv_jax.cli.show_scenes`."""

from mtv_jax.cli.show_scenes import main

if __name__ == "__main__":
  main()
