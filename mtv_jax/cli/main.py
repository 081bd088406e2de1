"""`mtv-jax COMMAND`: the command lines of the package.

A command is a module with a function `run`. The function's parameters become
the command's arguments (`arguments.add_parameters`); it returns the exit
status, or None for 0. A command with subcommands defines
`add_arguments(parser)` and `run(args)`. `--help` shows the module docstring.
"""

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from mtv_jax.cli import arguments, errors
from mtv_jax.utils import progress
from mtv_jax.utils.errors import InputError, did_you_mean

COMMANDS = {
  "train": "train a config",
  "evaluate": "evaluate encoders and write a report",
  "compare": "compare encoders side by side on a page",
  "supervise": "restart a training command until it is done",
  "study": "train runs that compare objectives, sizes or balancing",
  "knn": "k-NN classification",
  "linear_probe": "linear classification",
  "label": "label shards with an expert model",
  "make_labels": "write label sets from annotations",
  "inspect_labels": "sheet, page and statistics of label sets",
  "match_boxes": "compare an expert's boxes with annotations",
  "make_shards": "write shards of images and captions",
  "index": "write the table of blocks of shards in a bucket",
  "make_prompts": "write ImageNet's class names and prompts",
  "score_vqa": "score answers to questions about images",
  "convert": "convert to and from Hugging Face and big_vision",
  "push": "upload an export to the Hugging Face hub",
  "preflight": "compile a config for a topology without one",
  "bench": "benchmarks against limits of this machine",
  "report": "put runs on one page",
  "show_scenes": "draw built-in scenes with their labels",
}
# {command: "module:function"}, if not "command:run".
_FUNCTIONS = {"knn": "probe:run_knn", "linear_probe": "probe:run_linear_probe"}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `mtv-jax COMMAND ...`; returns the exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if argv and argv[0] in COMMANDS:
    return run_command(argv[0], argv[1:])
  names = "\n".join(f"  {name:<15} {text}" for name, text in COMMANDS.items())
  parser = argparse.ArgumentParser(
    prog="mtv-jax",
    description="Multi-task pretraining of vision encoders.",
    epilog=f"commands:\n{names}\n\n`mtv-jax COMMAND --help` has the options.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("command", metavar="COMMAND")
  name = parser.parse_args(argv[:1]).command
  hint = did_you_mean(name, COMMANDS)
  return parser.error(f"invalid choice: {name!r}. {hint}")


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
  """Runs one of `COMMANDS`, see `run_module`; returns the exit status."""
  module, function = _FUNCTIONS.get(name, f"{name}:run").split(":")
  return run_module(name, f"mtv_jax.cli.{module}", argv, function=function)


def run_module(
  name: str,
  module: str | ModuleType,
  argv: Sequence[str] | None = None,
  *,
  function: str = "run",
) -> int:
  """Runs `function` of a command's module; returns the exit status.

  User errors exit with their message. In the arguments, `--config.KEY=VALUE`
  means `--set=KEY=VALUE`, and hyphens in option names become underscores.
  Arguments after `--` are not changed.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  end = argv.index("--") if "--" in argv else len(argv)
  argv, rest = argv[:end], argv[end:]
  debug = "--debug" in argv
  with (
    errors.readable_errors(name, debug=debug),
    progress.report_silence(name),
  ):
    if isinstance(module, str):
      if module not in sys.modules and not {"-h", "--help"} & {*argv}:
        # Imports take seconds, on a busy machine a minute.
        print(f"{name}: starting", file=sys.stderr, flush=True)
      with progress.doing("importing"):
        module = importlib.import_module(module)
    parser = argparse.ArgumentParser(
      prog=f"mtv-jax {name}" if name in COMMANDS else None,
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      epilog=getattr(module, "EPILOG", None),
    )
    parser.add_argument(
      "--debug", action="store_true", help="show the traceback of an error"
    )
    run = getattr(module, function)
    has_subcommands = hasattr(module, "add_arguments")
    if has_subcommands:
      module.add_arguments(parser)
    else:
      arguments.add_parameters(parser, run)
    own = _normalize(a for a in argv if a != "--debug")
    args, unknown = parser.parse_known_args([*own, *rest])
    if unknown:
      given = unknown[0].partition("=")[0]
      options = re.findall(r"--\w+", parser.format_help())
      close = difflib.get_close_matches(given, options, n=1)
      hint = f" (did you mean {close[0]}?)" if close else ""
      parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    _check_outputs(name, args)
    return (run(args) if has_subcommands else arguments.call(run, args)) or 0


def _check_outputs(name: str, args: argparse.Namespace) -> None:
  """Rejects bucket URLs, which would create a local folder named `gs:`."""
  if name in ("chaos", "convert", "index", "label", "make_labels"):
    return
  for option in ("output", "json", "table", "profile"):
    value = getattr(args, option, None)
    # `Path` collapses the two slashes into one.
    if re.match("(gs|s3|hf):/", str(value)):
      raise InputError(
        f"--{option}={value}: this command writes files and folders only. Copy"
        " them to the bucket."
      )


def _normalize(argv):
  """Rewrites overrides as `--set`, and hyphens in options as underscores."""
  from mtv_jax.config import overrides

  option = re.compile(r"^--[a-z][a-z_-]*(?==|$)")
  return [
    option.sub(lambda match: "--" + match[0][2:].replace("-", "_"), arg)
    for arg in overrides.from_flags(argv)
  ]
