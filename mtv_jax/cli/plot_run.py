"""Plots a run's metrics over its steps.

mtv-jax plot_run runs/a --output=losses.svg
mtv-jax plot_run runs/a --names='^depth/|_r1$' --output=depth.png
"""

import argparse

from mtv_jax.utils import curves


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mtv-jax plot_run`."""
  parser.add_argument("run", help="the run's folder")
  parser.add_argument("--output", required=True, help=".svg, .png or .pdf")
  parser.add_argument(
    "--names", default=r"/loss$", help="regex of metrics; by default losses"
  )


def run(args: argparse.Namespace) -> None:
  """Writes the plot."""
  series = curves.read_metrics(args.run)
  curves.plot_metrics(series, args.names).savefig(args.output)
  print(f"wrote {args.output}")
