"""Restarts a training command until it exits with code 0.

  mtv-jax supervise -- mtv-jax train --config=... --workdir=runs/a

The pause before a restart doubles with each failure without progress. Progress
is a larger step in WORKDIR/alive; for commands without --workdir, it is a
session longer than --min_seconds. Stops after exit code 2 (invalid command line
or config), after --max_failures restarts without progress, and after SIGTERM,
SIGINT or SIGHUP, which it forwards to the command. Exits with the command's
last exit code.
"""

from collections.abc import Sequence
from typing import Annotated

from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.runtime.supervisor import Supervisor
from mtv_jax.utils import progress
from mtv_jax.utils.errors import ConfigError


def run(
  child: Sequence[str],
  /,
  *,
  max_failures: Annotated[int, 0] = 5,
  backoff: float = 10.0,
  max_backoff: float = 600.0,
  min_seconds: float = 600.0,
  grace: float = 600.0,
) -> int:
  """Runs the command until it succeeds; returns its last exit code.

  Args:
    child: the command, after --.
    max_failures: maximum number of consecutive restarts without progress.
    backoff: seconds before the first restart.
    max_backoff: maximum seconds before a restart.
    min_seconds: session length that counts as progress without --workdir.
    grace: seconds from a signal until the command is killed.
  """
  if not all(x >= 0 for x in (backoff, max_backoff, grace)):  # Rejects NaN too.
    names = "--backoff, --max_backoff and --grace"
    raise ConfigError(f"{names} must be at least 0.")
  setup_logging()
  progress.mute()  # The command has its own output.
  return Supervisor(
    child,
    max_failures=max_failures,
    backoff=backoff,
    max_backoff=max_backoff,
    min_seconds=min_seconds,
    grace=grace,
  ).run()
