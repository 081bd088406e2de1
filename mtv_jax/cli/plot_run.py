"""Plots a run's metrics over its steps.

mtv-jax plot_run runs/a --output=losses.svg
mtv-jax plot_run runs/a --names='^depth/|_r1$' --output=depth.png
"""

import argparse
import pathlib

from mtv_jax.utils import atomic, curves
from mtv_jax.utils.errors import check_choice


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
  figure = curves.plot_metrics(series, args.names)
  output = pathlib.Path(args.output)
  kind = output.suffix[1:]
  check_choice("the suffix", kind, figure.canvas.get_supported_filetypes())
  with atomic.replace_file(output) as temporary:
    figure.savefig(temporary, format=kind)
  print(f"wrote {args.output}")
