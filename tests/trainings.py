"""Runs the real training command, or code, in subprocesses."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from emulators import free_port
from xla_options import xla_flags

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.config import recipes
from mtv_jax.utils.tree import flatten_with_names

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "configs"
CONFIG = CONFIGS / "smallest.py"
# `python -m mtv_jax.main`, without the handlers inherited if the tests run
# under `nohup` or in the background: SIGHUP and SIGINT ignored.
_MAIN = """
import runpy, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("mtv_jax.main", run_name="__main__", alter_sys=True)
"""
# A run without evaluations.
NO_EVALS = "--config.evals.retrieval=None"
# Self-distillation on the smallest config's one view.
DINO = dict(
  view_global="image",
  view_local=None,
  same_crop="include",
  prototypes=8,
  hidden=8,
  bottleneck=4,
)


def smallest(arg: str = "", **changes):
  """The smallest config, with changes; `evals` replaces its evaluations."""
  config = recipes.read_config(f"{CONFIG}:{arg}" if arg else str(CONFIG))
  if "evals" in changes:
    config.evals = {}
  config.update(changes)
  return config


def launch(
  workdir: pathlib.Path,
  *args: str,
  devices: int = 1,
  arg: str = "",
  config: pathlib.Path = CONFIG,
) -> subprocess.Popen:
  """Starts `python -m mtv_jax.main`, by default on the smallest config."""
  return spawn(
    workdir,
    '-c', _MAIN,
    f'--config={config}:{arg}' if arg else f'--config={config}',
    f'--workdir={workdir}', *args,
    devices=devices,
  )  # fmt: skip


def spawn(
  workdir: pathlib.Path, *args: str, devices: int = 1
) -> subprocess.Popen:
  """Starts Python with arguments; `finish` shows its output."""
  env = {
    **cpu_env(devices), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"
  }  # fmt: skip
  workdir.parent.mkdir(parents=True, exist_ok=True)
  # The child process has its own handle.
  with open(f"{workdir}.log", "a") as log:
    return subprocess.Popen(
      [sys.executable, *args],
      cwd=ROOT,
      env=env,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen, workdir: pathlib.Path) -> None:
  """Waits for a run and shows its log if it failed."""
  code = process.wait(timeout=400)
  log = pathlib.Path(f"{workdir}.log").read_text()
  assert code == 0, f"exit code {code}:\n{log[-4000:]}"


def train(workdir: pathlib.Path, *args: str, **options) -> None:
  """Trains to the end."""
  finish(launch(workdir, *args, **options), workdir)


def free_address() -> str:
  """An address for `jax.distributed`."""
  return f"localhost:{free_port()}"


def cpu_env(devices: int) -> dict[str, str]:
  """This environment, with so many CPU devices."""
  flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
  return {**os.environ, **flags}


@contextlib.contextmanager
def killing(running: list[subprocess.Popen]) -> Iterator[None]:
  """Kills the processes at the end."""
  try:
    yield
  finally:
    for process in running:
      process.kill()
      process.wait()


def run_pair(code: str, *args: str, devices: int) -> None:
  """Runs Python code in two processes that `jax.distributed` joins.

  `process` is 0 or 1 there, and `args` follow in `sys.argv[1:]`.
  """
  address = free_address()
  paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
  env = {**cpu_env(devices), "PYTHONPATH": paths}
  join = (
    "import jax; process = {}\n"
    "jax.config.update('jax_cpu_collectives_implementation', 'gloo')\n"
    "jax.distributed.initialize({!r}, 2, process)\n"
  )
  commands = [
    [sys.executable, "-c", join.format(i, address) + code, *args]
    for i in range(2)
  ]
  running = [subprocess.Popen(command, env=env) for command in commands]
  with killing(running):
    assert [process.wait(timeout=600) for process in running] == [0, 0]


@contextlib.contextmanager
def together(
  workdir: pathlib.Path,
  count: int,
  *args: str,
  start: Callable[..., subprocess.Popen] = launch,
  **options,
) -> Iterator[list[subprocess.Popen]]:
  """Runs in `count` processes, joined by `jax.distributed` if several.

  Arguments and options are passed to `start`.
  """
  address = free_address()
  running = []
  with killing(running):
    for i in range(count):
      join = f"--coordinator={address} --processes={count} --process={i}"
      join = join.split() if count > 1 else ()
      running.append(start(workdir, *join, *args, **options))
    yield running


def pair(
  workdir: pathlib.Path, *args: str, devices: int = 4, arg: str = ""
) -> None:
  """Trains to the end in two processes."""
  with together(workdir, 2, *args, devices=devices, arg=arg) as running:
    for process in running:
      finish(process, workdir)


def rows(workdir: pathlib.Path) -> list[dict]:
  """The lines of metrics.jsonl."""
  path = workdir / "metrics.jsonl"
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]


def log(workdir: pathlib.Path) -> str:
  """All that the processes of a run have printed."""
  return pathlib.Path(f"{workdir}.log").read_text()


def problems(workdir: pathlib.Path) -> list[str]:
  """The errors in the log, without the lines that a run is alive."""
  alive = re.compile(r"train: (starting|.+, (\d+[hms])+)$")
  lines = (line for line in log(workdir).splitlines() if line)
  return [s for s in lines if s.startswith("train: ") and not alive.match(s)]


def wait_for_step(
  workdir: pathlib.Path, step: int, running: list[subprocess.Popen]
) -> None:
  """Returns once a step is logged; fails if a process ends before."""
  deadline = time.monotonic() + 400
  while max(losses(workdir), default=0) < step:
    assert all(p.poll() is None for p in running), log(workdir)
    assert time.monotonic() < deadline, log(workdir)
    time.sleep(0.05)


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """The loss by step."""
  return {r["step"]: r["loss"] for r in rows(workdir) if "loss" in r}


def params(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The last checkpoint's parameters by name."""
  tree = load_tree(workdir, part="params")
  return dict(flatten_with_names(tree))
