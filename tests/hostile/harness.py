"""Harness of the hostile corpus: cases that run in a process of their own.

A case is a function that gives a reader a hostile input. It must end in an
outcome that the case allows, within 10 s and 1 GiB above the start:

  error  it raises a `UserError` (a named error)
  skip   it raises a `BadRecord`, or returns "skip" (a counted skip)
  used   it returns anything else: the input is odd, and usable

Any other exception is a defect, as is a crash. A worker process runs the cases
one by one; it is killed and replaced when a case hangs, crashes or
takes too much memory. A test file has its cases at the level of the module,
since the worker imports the file to find them:

  HEADERS = Cases(__file__, "tar headers")

  @HEADERS.add("a negative size")
  def _(folder):
    expand_path(...)

  # A case for each input, by name, that `read(folder, input)` reads.
  HEADERS.add_table(read, {"empty": b"", "a page": b"<html>"}, match="x.tar")

  test_cases = run_all(HEADERS)

Every few cases one is in the fast suite; the rest have the marker `long`. The
fixture `hostile` is in conftest.py of this folder. A run of pytest ends with
the table of counts (`table`).
"""

import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import pytest

from mtv_jax.data.records import BadRecord
from mtv_jax.utils.errors import UserError

MAX_SECONDS = 10.0
MAX_BYTES = 1 << 30
# A message is for a person to read, and is a line of a log.
MAX_MESSAGE = 3000
_POLL_SECONDS = 0.01

Function = Callable[[pathlib.Path], Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One hostile input.

  Attributes:
    file: the test file that defines it.
    subject: row of the table.
    name: unique within its subject.
    run: gives the input, written to an empty folder, to a reader.
    expects: allowed outcomes.
    match: text that the message contains.
  """

  file: str
  subject: str
  name: str
  run: Function
  expects: tuple[str, ...]
  match: str


@dataclasses.dataclass(frozen=True)
class Result:
  """How a case ended: `error`, `skip`, `used`, or a defect."""

  outcome: str
  detail: str  # The message, or the value returned.
  seconds: float
  peak: int  # Bytes above the start.


class Cases(list[Case]):
  """The cases of one subject in a test file; one in `every` is fast."""

  def __init__(self, file: str, subject: str, *, every: int = 3):
    super().__init__()
    self._file, self._subject, self._every = file, subject, every
    self._names: set[str] = set()
    self._slow: set[str] = set()

  def add(
    self,
    name: str,
    function: Function | None = None,
    *,
    expects: str = "error",
    match: str = "",
    slow: bool = False,
  ) -> Any:
    """Adds a case; a decorator without `function`.

    Args:
      name: unique within the subject.
      function: takes an empty folder.
      expects: allowed outcomes, such as "error" or "error skip".
      match: text that the message must contain.
      slow: whether it takes more than a second.
    """
    if function is None:
      return functools.partial(
        self.add, name, expects=expects, match=match, slow=slow
      )
    allowed = tuple(expects.split())
    assert name not in self._names, name
    self._names.add(name)
    if slow or len(self) % self._every:
      self._slow.add(name)
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
      run = functools.partial(_call, read, value)
      self.add(prefix + name, run, **options)

  @property
  def parametrize(self) -> pytest.MarkDecorator:
    """Decorates a test of the cases, which takes one as `case`."""
    return pytest.mark.parametrize("case", self.parameters)

  @property
  def parameters(self) -> list[Any]:
    """The parameters of a test that takes one as `case`."""
    long = pytest.mark.long
    return [
      pytest.param(
        case,
        id=f"{case.subject}: {case.name}",
        marks=long if case.name in self._slow else (),
      )
      for case in self
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
    self._process: Any = None
    self._connection: Connection | None = None

  def run(self, case: Case, folder: pathlib.Path) -> Result:
    """Runs a case in an empty folder; kills what exceeds the limits."""
    if self._process is None:
      self._start()
    files = case.file, case.subject, case.name, str(folder)
    # Imports are the file's, not the case's.
    self._connection.send(files[:1])
    assert self._connection.recv() == "ready", "the cases can't be imported"
    start = _resident(self._process.pid)
    began = time.monotonic()
    self._connection.send(files)
    peak = start
    while True:
      seconds = time.monotonic() - began
      try:
        if self._connection.poll(_POLL_SECONDS):
          outcome, detail, highest = self._connection.recv()
          return Result(outcome, detail, seconds, max(peak, highest) - start)
        peak = max(peak, _resident(self._process.pid))
      except (EOFError, OSError):
        self._process.join()
        detail = f"exit code {self._process.exitcode}"
        self.close()
        return Result("crash", detail, seconds, peak - start)
      if seconds > MAX_SECONDS or peak - start > MAX_BYTES:
        self.close()
        outcome = "slow" if seconds > MAX_SECONDS else "large"
        return Result(outcome, "killed", seconds, peak - start)

  def check(self, case: Case, folder: pathlib.Path) -> Result:
    """Runs a case; asserts that its outcome is allowed and readable."""
    result = self.run(case, folder)
    shutil.rmtree(folder)
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
      assert len(detail) <= MAX_MESSAGE, (
        f"the message has {len(detail)} characters: {detail[:300]!r}"
      )
      detail.encode()  # A message must be printable.
    # Not in the folder's path, which has the name of the test.
    named = detail.replace(str(folder), "")
    assert case.match in named, f"{case.match!r} is not in {detail!r}"
    return result

  def _start(self) -> None:
    # Not forked: this process may have threads of JAX.
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()

  def close(self) -> None:
    """Kills the worker."""
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._connection.close()
    self._process = self._connection = None


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


def _serve(connection: Connection) -> None:
  """The worker: imports files of cases, and runs cases by name."""
  modules: dict[str, Any] = {}
  while True:
    try:
      file, *request = connection.recv()
    except EOFError:
      return
    if file not in modules:
      modules[file] = _import(file)
    if not request:
      connection.send("ready")
      continue
    subject, name, folder = request
    case = find(modules[file], subject, name)
    os.chdir(folder)
    before = _highest()
    outcome, detail = _run(case, pathlib.Path(folder))
    after = _highest()
    # The maximum since the start of the process tells only of a new one.
    connection.send((outcome, detail, after if after > before else 0))


def _import(file: str) -> Any:
  name = f"hostile_cases_{pathlib.Path(file).stem}"
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def find(module: Any, subject: str, name: str) -> Case:
  """The case of a module by its subject and name."""
  for value in vars(module).values():
    for case in value if isinstance(value, Cases) else ():
      if (case.subject, case.name) == (subject, name):
        return case
  raise LookupError(f"{module} has no case {name!r} of {subject!r}")


def _run(case: Case, folder: pathlib.Path) -> tuple[str, str]:
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


def table(results: Iterable[tuple[str, str, float, int]]) -> str:
  """The counts of (subject, outcome, seconds, peak) by subject."""
  rows: dict[str, list[tuple[str, float, int]]] = {}
  for subject, *rest in results:
    rows.setdefault(subject, []).append(tuple(rest))
    rows.setdefault("all", []).append(tuple(rest))
  rows["all"] = rows.pop("all", [])
  columns = ("error", "skip", "used", "failed")
  lines = [
    f"{'subject':32}{'cases':>7}"
    + "".join(f"{column:>8}" for column in columns)
    + f"{'slowest':>10}{'largest':>10}"
  ]
  for subject, entries in rows.items():
    counts = [
      sum(outcome == column for outcome, _, _ in entries) for column in columns
    ]
    slowest = max((seconds for _, seconds, _ in entries), default=0)
    largest = max((peak for _, _, peak in entries), default=0)
    lines.append(
      f"{subject:32}{len(entries):7}"
      + "".join(f"{count:8}" for count in counts)
      + f"{slowest:8.1f} s{largest >> 20:6} MiB"
    )
  return "\n".join(lines)
