"""Restarts a training command until it exits with 0.

  mtv-jax supervise -- mtv-jax train --config=... --workdir=runs/a

After a failure the command starts again, after a pause that doubles with each
failure without progress. Progress is a larger step in WORKDIR/alive; without a
--workdir in the command, a session longer than --min_seconds. It is not started
again after exit code 2 (the command line or the config can't be used), after
--max_failures restarts without progress, and after SIGTERM, SIGINT or SIGHUP to
this process, which are passed on. The exit code is the command's last one.
"""

from collections.abc import Sequence
from typing import Annotated

from mtv_jax.train.metrics import setup_logging
from mtv_jax.train.runtime.supervisor import Supervisor
from mtv_jax.utils.errors import ConfigError


def run(
  child: Sequence[str],
  /,
  *,
  max_failures: Annotated[int, 0] = 5,
  backoff: float = 10.0,
  max_backoff: float = 600.0,
  min_seconds: float = 600.0,
) -> int:
  """Runs the command until it is done; returns its exit code.

  Args:
    child: the command, after --.
    max_failures: restarts in a row without progress.
    backoff: seconds before the first restart.
    max_backoff: seconds at most.
    min_seconds: a session that is progress, of a command without --workdir.
  """
  if not (backoff >= 0 and max_backoff >= 0):  # Nor NaN.
    raise ConfigError("--backoff and --max_backoff must be at least 0.")
  setup_logging()
  return Supervisor(
    child,
    max_failures=max_failures,
    backoff=backoff,
    max_backoff=max_backoff,
    min_seconds=min_seconds,
  ).run()
