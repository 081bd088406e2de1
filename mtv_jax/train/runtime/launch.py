"""Launches training runs as subprocesses."""

import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence


def launch(
  config: str,
  workdir: object,
  assignments: Sequence[str] = (),
  *,
  log: pathlib.Path,
  processes: int = 1,
) -> list[subprocess.Popen]:
  """Starts `mtv-jax train` in one process or several distributed ones.

  Args:
    config: the value of `--config`.
    workdir: the run's folder or URL.
    assignments: overrides, KEY=VALUE.
    log: file to which the processes append their output.
    processes: number of processes on this machine.
  """
  command = [sys.executable, "-m", "mtv_jax.main"]
  command += [f"--config={config}", f"--workdir={workdir}"]
  command += [f"--set={assignment}" for assignment in assignments]
  joins = [[]]
  if processes > 1:
    with socket.socket() as free:
      free.bind(("localhost", 0))
      join = [f"--coordinator=localhost:{free.getsockname()[1]}"]
    # Short, since all processes start together.
    join += [f"--processes={processes}", "--connect_seconds=100"]
    joins = [[*join, f"--process={i}"] for i in range(processes)]
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open("ab") as stream:
    return [
      subprocess.Popen(
        [*command, *join], stdout=stream, stderr=subprocess.STDOUT
      )
      for join in joins
    ]
