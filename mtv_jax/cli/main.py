"""`mtv-jax COMMAND`: the package's command line.

A command is a module with a function `run`. The function's parameters become
the command's arguments (`arguments.add_parameters`); it returns the exit
status, or None for 0. A command with subcommands defines
`add_arguments(parser)` and `run(args)`. `--help` shows the module docstring.
"""

import argparse
import contextlib
import difflib
import importlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType

from mtv_jax.utils.errors import InputError, did_you_mean

GROUPS = {
  "train": {
    "train": "train a config",
    "supervise": "restart a training command until it is done",
    "study": "train runs that compare objectives, sizes or balancing",
  },
  "data": {
    "make_shards": "write shards of images and captions",
    "label": "label shards with an expert model",
    "make_labels": "write label sets from annotations",
    "inspect_labels": "page and statistics of label sets",
    "index": "write the table of blocks of shards in a bucket",
  },
  "evaluate": {
    "evaluate": "evaluate encoders and write a report",
    "compare": "compare encoders side by side on a page",
    "report": "put runs on one page",
    "interference": "compare the objectives' gradients of a run",
  },
  "share": {
    "convert": "convert to and from Hugging Face and big_vision",
    "push": "upload an export to the Hugging Face hub",
  },
  "plan": {
    "config": "print a resolved config, or what differs between two",
    "preflight": "compile a config for a topology, without hardware",
  },
  # Listed only by --all.
  "developer": {
    "bench": "benchmarks against limits of this machine",
    "make_questions": "write questions about built-in scenes",
    "make_prompts": "write ImageNet's class names and prompts",
    "match_boxes": "compare an expert's boxes with annotations",
    "score_vqa": "score answers to questions about images",
    "show_scenes": "draw built-in scenes with their labels",
  },
}
COMMANDS = {name: text for g in GROUPS.values() for name, text in g.items()}
# {command: "module:function"}, if not "command:run".
_FUNCTIONS: dict[str, str] = {}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `mtv-jax COMMAND ...`; returns the exit status.

  `argv` defaults to the process's command line.
  """
  if argv is None:
    with end_at_interrupt():
      return main(sys.argv[1:])
  argv = list(argv)
  if argv and argv[0] in COMMANDS:
    return run_command(argv[0], argv[1:])
  parser = argparse.ArgumentParser(
    prog="mtv-jax",
    description="Multi-task pretraining of vision encoders.",
    epilog=_list_commands(show_all="--all" in argv),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  text = "with --help: also list developer commands"
  parser.add_argument("--all", action="store_true", help=text)
  parser.add_argument("command", metavar="COMMAND")
  command_words = [arg for arg in argv if arg != "--all"][:1]
  name = parser.parse_args(command_words).command
  hint = did_you_mean(name, COMMANDS)
  return parser.error(f"invalid choice: {name!r}. {hint}")


@contextlib.contextmanager
def end_at_interrupt() -> Iterator[None]:
  """Lets Ctrl-C end the process while libraries are imported.

  Some print tracebacks otherwise. Does nothing outside the main thread, or if
  SIGINT already has a handler.
  """
  previous = signal.getsignal(signal.SIGINT)
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or previous is not signal.default_int_handler:
    yield
    return
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)


def _list_commands(*, show_all: bool) -> str:
  lines = []
  for group, commands in GROUPS.items():
    if show_all or group != "developer":
      lines += [f"{group}:"]
      lines += [f"  {name:<15} {text}" for name, text in commands.items()]
  lines += ["", "`mtv-jax COMMAND --help` lists the options."]
  if not show_all:
    lines += ["`mtv-jax --help --all` also lists the developer commands."]
  return "\n".join(lines)


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
  """Runs one of `COMMANDS`, see `run_module`; returns the exit status."""
  module, function = find_function(name)
  return run_module(name, module, argv, function=function)


def find_function(name: str) -> tuple[str, str]:
  """Returns the module and the function of a command."""
  module, function = _FUNCTIONS.get(name, f"{name}:run").split(":")
  return f"mtv_jax.cli.{module}", function


def run_module(
  name: str,
  module: str | ModuleType,
  argv: Sequence[str] | None = None,
  *,
  function: str = "run",
) -> int:
  """Runs `function` of a command's module; returns the exit status.

  User errors exit with their message.
  """
  from mtv_jax.cli import arguments, errors
  from mtv_jax.config.options import import_module
  from mtv_jax.train.runtime import preemption
  from mtv_jax.utils import progress

  argv = list(sys.argv[1:] if argv is None else argv)
  options = argv[: argv.index("--")] if "--" in argv else argv
  with (
    errors.readable_errors(name, debug="--debug" in options),
    progress.report_silence(name),
  ):
    if isinstance(module, str):
      if module not in sys.modules and not {"-h", "--help"} & {*options}:
        # Imports take seconds, on a busy machine a minute.
        print(f"{name}: starting", file=sys.stderr, flush=True)
      with progress.activity("importing"):
        module = importlib.import_module(module)
    args = parse(name, module, argv, function=function)
    for plugin in args.plugin:
      import_module(plugin, f"--plugin={plugin}")
    run = getattr(module, function)
    has_subcommands = hasattr(module, "add_arguments")
    with preemption.exit_on_interrupt(name):
      return (run(args) if has_subcommands else arguments.call(run, args)) or 0


def parse(
  name: str, module: ModuleType, argv: Sequence[str], *, function: str = "run"
) -> argparse.Namespace:
  """Parses a command's arguments; exits if they are invalid.

  `--config.KEY=VALUE` means `--set=KEY=VALUE`, and hyphens in option names
  become underscores. Arguments after `--` stay unchanged.
  """
  from mtv_jax.cli import arguments
  from mtv_jax.config import data_arguments

  end = argv.index("--") if "--" in argv else len(argv)
  # Options of all commands, which parsers of subcommands lack.
  common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  common.add_argument(
    "--debug", action="store_true", help="show the traceback of an error"
  )
  text = "import a module with plug-ins that a run or an export names"
  common.add_argument(
    "--plugin", metavar="MODULE", action="append", default=[], help=text
  )
  parser = argparse.ArgumentParser(
    prog=f"mtv-jax {name}" if name in COMMANDS else None,
    description=module.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=getattr(module, "EPILOG", None),
    parents=[common],
  )
  if hasattr(module, "add_arguments"):
    module.add_arguments(parser)
  else:
    arguments.add_parameters(parser, getattr(module, function))
  args, command_arguments = common.parse_known_args(_normalize(argv[:end]))
  args, unknown = parser.parse_known_args(
    [*command_arguments, *argv[end:]], args
  )
  if unknown:
    flag = unknown[0].partition("=")[0]
    options = re.findall(r"--\w+", parser.format_help())
    if flag[2:] in data_arguments.ARGUMENTS and "--config" in options:
      recipe = f"--config=RECIPE:{unknown[0][2:]}"
      parser.error(f"{unknown[0]} is an argument of the recipe: {recipe}")
    matches = difflib.get_close_matches(flag, options, n=1)
    hint = f" (did you mean {matches[0]}?)" if matches else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
  _check_outputs(name, args)
  return args


def _check_outputs(name: str, args: argparse.Namespace) -> None:
  """Rejects bucket URLs, which would create a local folder named `gs:`."""
  if name in ("convert", "index", "label", "make_labels"):
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
