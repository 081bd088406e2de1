"""`mtv-jax COMMAND`: the command lines of the package.

A command is a module of this package with `add_arguments(parser)` and
`run(args)`, which returns the exit status, or None for 0; its docstring is the
text of `--help`. `tools/*.py` and `python -m mtv_jax.main` call `command`.
"""

import argparse
import functools
import importlib
import re
import sys
from collections.abc import Callable, Sequence

from mtv_jax.cli import errors
from mtv_jax.utils.errors import InputError

COMMANDS = {
  "train": "train a config",
  "evaluate": "evaluate encoders and write a report",
  "compare": "compare encoders side by side on a page",
  "supervise": "restart a training command until it is done",
  "chaos": "kill a run at random moments and compare it",
  "soak": "memory and step time of a long run",
  "study": "train runs that compare objectives, sizes or balancing",
  "knn": "k-NN classification",
  "linear_probe": "linear classification",
  "label": "label shards with an expert model",
  "make_labels": "write label sets from annotations",
  "inspect_labels": "sheet, page and statistics of label sets",
  "match_boxes": "compare an expert's boxes with annotations",
  "make_shards": "write shards of images and captions",
  "make_prompts": "write ImageNet's class names and prompts",
  "score_vqa": "score answers to questions about images",
  "convert": "convert to and from Hugging Face and big_vision",
  "push": "upload an export to the Hugging Face hub",
  "preflight": "compile a config for a topology without one",
  "bench": "benchmarks against limits of this machine",
  "report": "put runs on one page",
  "show_scenes": "draw built-in scenes with their labels",
}
# Modules of commands that are not called after them.
_MODULES = {"knn": "probe", "linear_probe": "probe"}


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
  parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
  parser.parse_args(argv)
  return 2  # Not reached: argparse exits on anything but a command.


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
  """Runs one of `COMMANDS`; user errors exit with their message.

  Args:
    name: the command's name.
    argv: arguments; default: the process's. `--config.KEY=VALUE` is the same as
      `--set=KEY=VALUE`, and a hyphen in an option's name as an underscore.
      What follows `--` stays as it is.

  Returns:
    The exit status.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  end = argv.index("--") if "--" in argv else len(argv)
  argv, rest = argv[:end], argv[end:]
  debug = "--debug" in argv
  with errors.readable_errors(name, debug=debug):
    module = importlib.import_module(f"mtv_jax.cli.{_MODULES.get(name, name)}")
    parser = argparse.ArgumentParser(
      prog=f"mtv-jax {name}",
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
      "--debug", action="store_true", help="show the traceback of an error"
    )
    parser.set_defaults(command_name=name)
    module.add_arguments(parser)
    own = _normalize(a for a in argv if a != "--debug")
    args = parser.parse_args([*own, *rest])
    _check_outputs(name, args)
    return module.run(args) or 0


def command(name: str) -> Callable[..., int]:
  """The `main(argv=None)` of a script that runs one command."""
  return functools.partial(run_command, name)


def _check_outputs(name: str, args: argparse.Namespace) -> None:
  """Rejects outputs in buckets, where a folder named `gs:` would be made."""
  if name in ("chaos", "convert"):
    return
  for option in ("output", "json", "table", "profile"):
    value = getattr(args, option, None)
    # A `Path` has one slash.
    if re.match("(gs|s3):/", str(value)):
      raise InputError(
        f"--{option}={value}: this command writes files and folders only. Copy"
        " them to the bucket."
      )


def _normalize(argv):
  """Overrides as `--set`, option names with underscores."""
  from mtv_jax.config import overrides

  option = re.compile(r"^--[a-z][a-z_-]*(?==|$)")
  return [
    option.sub(lambda match: "--" + match[0][2:].replace("-", "_"), arg)
    for arg in overrides.from_flags(argv)
  ]
