"""Harness of the hostile corpus: cases that run in a process of their own.

A case gives a reader a hostile input. It must end in an outcome that the case
allows, within 10 s and 1 GiB above the start:

  error  it raises a `UserError` (a named error)
  skip   it raises a `BadRecord`, or returns "skip" (a counted skip)
  used   it returns anything else: the input is odd, and usable

Any other exception is a defect, as is a crash, or a file in the home or in the
parents of the case's folder, which is the working directory. A worker process
runs the cases one by one; it is killed and replaced when a case hangs, crashes
or takes too much memory. The worker imports the test file to find its cases,
which are at module level:

  HEADERS = Cases(__file__, "tar headers")
  # A case for each input, by name, that `read(folder, input)` reads.
  HEADERS.add_table(read, {"empty": b"", "a page": b"<html>"}, match="x.tar")

  @HEADERS.add("a negative size")
  def _(folder):
    expand_path(...)

  test_cases = run_all(HEADERS)

A few cases of each subject are in the fast suite; the rest have the marker
`long`.
"""

import dataclasses
import functools
import multiprocessing
import os
import pathlib
import resource
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import UserError

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30
MAX_MESSAGE = 3000  # Characters: a message is for a person to read.
_POLL_SECONDS = 0.01

Function = Callable[[pathlib.Path], Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One hostile input; `run` takes an empty folder."""

  file: str  # The test file that defines it.
  subject: str
  name: str  # Unique within its subject.
  run: Function
  expects: tuple[str, ...]  # Allowed outcomes.
  match: str  # Text that the message contains.


@dataclasses.dataclass(frozen=True)
class Result:
  """How a case ended: `error`, `skip`, `used`, or a defect."""

  outcome: str
  detail: str  # The message, or the value returned.
  seconds: float
  peak: int  # Bytes above the start.


class Cases(list[Case]):
  """The cases of one subject in a test file; `fast` are not `long`."""

  def __init__(self, file: str, subject: str, *, fast: int = 4):
    super().__init__()
    self._file, self._subject, self._fast = file, subject, fast

  def add(
    self,
    name: str,
    function: Function | None = None,
    *,
    expects: str = "error",
    match: str = "",
  ) -> Any:
    """Adds a case; a decorator without `function`.

    `expects` are allowed outcomes, such as "error skip".
    """
    if function is None:
      return functools.partial(self.add, name, expects=expects, match=match)
    assert name not in {case.name for case in self}, name
    allowed = tuple(expects.split())
    self.append(Case(self._file, self._subject, name, function, allowed, match))
    return function

  def add_table(
    self,
    read: Callable[[pathlib.Path, Any], Any],
    inputs: Mapping[str, Any],
    *,
    prefix: str = "",
    **options: Any,
  ) -> None:
    """Adds a case for each input; `read` takes an empty folder and one."""
    for name, value in inputs.items():
      self.add(prefix + name, functools.partial(_call, read, value), **options)

  @property
  def parameters(self) -> list[Any]:
    """The parameters of a test that takes one as `case`."""
    step = -(-len(self) // self._fast)
    return [
      pytest.param(
        case,
        id=f"{case.subject}: {case.name}",
        marks=pytest.mark.long if i % step else (),
      )
      for i, case in enumerate(self)
    ]


def _call(read: Callable[..., Any], value: Any, folder: pathlib.Path) -> Any:
  return read(folder, value)


def run_all(*groups: Cases) -> Callable[..., None]:
  """A test of all cases, for a test file."""
  parameters = [p for group in groups for p in group.parameters]

  @pytest.mark.parametrize("case", parameters)
  def test(case: Case, hostile: Callable[[Case], None]) -> None:
    hostile(case)

  return test


class Runner:
  """Runs cases in a worker process, which it replaces when it must."""

  def __init__(self) -> None:
    self._pool: futures.ProcessPoolExecutor | None = None

  def run(self, case: Case, folder: pathlib.Path) -> Result:
    """Runs a case in an empty folder; kills what exceeds the limits."""
    if self._pool is None:
      # Not forked: this process may have threads of JAX.
      context = multiprocessing.get_context("spawn")
      self._pool = futures.ProcessPoolExecutor(1, context)
    # The time of imports doesn't count.
    self._pool.submit(_import, case.file).result()
    (process,) = self._pool._processes.values()
    start = peak = _resident(process.pid)
    began = time.monotonic()
    files = case.file, case.subject, case.name, str(folder)
    future = self._pool.submit(_run, *files)
    while not futures.wait([future], _POLL_SECONDS).done:
      seconds = time.monotonic() - began
      peak = max(peak, _resident(process.pid))
      if seconds > MAX_SECONDS or peak - start > MAX_BYTES:
        self.close()
        outcome = "slow" if seconds > MAX_SECONDS else "large"
        return Result(outcome, "killed", seconds, peak - start)
    seconds = time.monotonic() - began
    try:
      outcome, detail, highest = future.result()
    except BrokenProcessPool:
      self.close()
      detail = f"exit code {process.exitcode}"
      return Result("crash", detail, seconds, peak - start)
    return Result(outcome, detail, seconds, max(peak, highest) - start)

  def check(self, case: Case, root: pathlib.Path) -> Result:
    """Runs a case; asserts that its outcome is allowed and readable."""
    folder = root / "parent" / "case"
    folder.mkdir(parents=True)
    (root / "home").mkdir()
    result = self.run(case, folder)
    shutil.rmtree(folder)
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    shutil.rmtree(root)
    assert left == ["home", "parent"], f"{case.name}: writes outside: {left}"
    outcome, detail = result.outcome, result.detail
    assert outcome in case.expects, (
      f"{case.subject}: {case.name}: expected {' or '.join(case.expects)}, got"
      f" {outcome} after {result.seconds:.1f} s and {result.peak >> 20} MiB:"
      f" {detail[:MAX_MESSAGE]}"
    )
    assert result.seconds <= MAX_SECONDS, result
    assert result.peak <= MAX_BYTES, result
    if outcome in ("error", "skip"):
      assert detail.strip(), "the message is empty"
      assert len(detail) <= MAX_MESSAGE, detail[:300]
      detail.encode()  # A message must be printable.
    # Not in the folder's path, which has the name of the test.
    named = detail.replace(str(folder), "")
    assert case.match in named, f"{case.match!r} is not in {detail!r}"
    return result

  def close(self) -> None:
    """Kills the worker."""
    if self._pool is not None:
      for process in [*(self._pool._processes or {}).values()]:
        process.kill()
      self._pool.shutdown()
    self._pool = None


def _resident(pid: int) -> int:
  """Resident bytes of a process; 0 if it has ended or /proc is absent."""
  try:
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
  except (OSError, IndexError):
    return 0
  return int(pages) * resource.getpagesize()


def _highest() -> int:
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def _cases(file: str) -> dict[tuple[str, str], Case]:
  """The cases of a file, by subject and name; in the worker."""
  groups = [v for v in runpy.run_path(file).values() if isinstance(v, Cases)]
  return {(case.subject, case.name): case for g in groups for case in g}


def _import(file: str) -> None:
  _cases(file)


def _run(file: str, subject: str, name: str, folder: str) -> tuple:
  """Outcome, message and a new maximum of memory; in the worker."""
  os.chdir(folder)
  os.environ["HOME"] = str(pathlib.Path(folder).parents[1] / "home")
  before = _highest()
  outcome, detail = _outcome(_cases(file)[subject, name], pathlib.Path(folder))
  after = _highest()
  # The maximum since the start of the process tells only of a new one.
  return outcome, detail, after if after > before else 0


def _outcome(case: Case, folder: pathlib.Path) -> tuple[str, str]:
  try:
    value = case.run(folder)
  except BadRecord as error:
    return "skip", str(error)
  except UserError as error:
    return "error", str(error)
  except BaseException as error:
    return "defect", ascii(f"{type(error).__name__}: {error}")[:MAX_MESSAGE]
  if isinstance(value, tuple) and value[0] in ("error", "skip"):
    return value  # With the reason.
  return ("skip", "skip") if value == "skip" else ("used", repr(value)[:200])
