"""JAX's distributed runtime: initialisation, gathers and agreement."""

import collections
import concurrent.futures
import itertools
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtv_jax.config.overrides import list_differences
from mtv_jax.utils.errors import ConfigError, InputError, printable
from mtv_jax.utils.text import list_first
from mtv_jax.utils.threads import available_cores, map_ahead

T = TypeVar("T")
# Limits in errors: differences, characters per value, ranges of processes.
_MAX_DIFFERENCES, _MAX_CHARACTERS, _MAX_RANGES = 5, 120, 8
# Items per exchange between processes, and exchanges computed ahead. Both must
# be equal in all processes, whatever their number of cores.
_ITEMS_PER_ROUND, _ROUNDS_AHEAD = 16, 2


class ProcessMismatchError(ConfigError):
  """Raised if values that must be equal differ between a run's processes."""

  exit_code = 1  # A restart may make them equal.


def initialize(
  *,
  distributed: bool = False,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  seconds: int = 300,
) -> None:
  """Calls `jax.distributed.initialize`; must precede any use of a device.

  On TPU pods, SLURM and Open MPI JAX detects the cluster. Elsewhere pass the
  coordinator (host:port of process 0), the number of processes and this
  process's index. JAX aborts unless all processes connect within `seconds`.

  Raises InputError if only some of coordinator, processes and process are
  set.
  """
  arguments = [coordinator, processes, process]
  if any(g is not None for g in arguments) and None in arguments:
    raise InputError(
      f"--coordinator, --processes and --process go together, got {arguments}."
    )
  if distributed or coordinator:
    jax.distributed.initialize(*arguments, initialization_timeout=seconds)
    devices = collections.Counter(d.process_index for d in jax.devices())
    # JAX's gathers need equally many devices on each process.
    if jax.default_backend() == "cpu" and len(set(devices.values())) == 1:
      _connect_cpus()


def _connect_cpus() -> None:
  """Runs the first collective without the lines Gloo prints to stdout."""
  sys.stdout.flush()
  with open(os.devnull, "w") as null:
    stdout = os.dup(1)
    os.dup2(null.fileno(), 1)
    try:
      multihost_utils.sync_global_devices("connect")
    finally:
      os.dup2(stdout, 1)
      os.close(stdout)


def any_process(flag: bool) -> bool:
  """Whether any process sets the flag. Collective: all processes call it."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def gather_json(value: Any) -> list[Any]:
  """Gathers JSON values in process order. Collective: all processes call it."""
  if jax.process_count() == 1:
    return [value]
  return [json.loads(row) for row in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[bytes]:
  """Gathers bytes in process order. Collective: all processes call it.

  Pads to a power of two, so that few shapes are compiled.
  """
  sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
  padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)  # [processes, bytes]
  pairs = zip(rows, sizes, strict=True)
  return [np.asarray(row[:size]).tobytes() for row, size in pairs]


def shared_map(
  function: Callable[[Any], Any], items: Iterable[Any], *, ahead: int = 0
) -> Iterator[Any]:
  """Like `map_ahead`, but divides the items among the processes of a pod.

  Each of P processes computes every P-th item and receives all results. All
  processes must iterate equal items at the same point of the program. An error
  in one process is raised in all. Several processes ignore `ahead`.
  """
  processes, process = jax.process_count(), jax.process_index()
  if processes == 1:
    yield from map_ahead(function, items, ahead=ahead)
    return
  items = iter(items)
  size = processes * -(-_ITEMS_PER_ROUND // processes)
  pending: collections.deque = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
    while True:
      if batch := list(itertools.islice(items, size)):
        own_items = batch[process::processes]
        pending.append(
          (len(batch), [pool.submit(function, x) for x in own_items])
        )
        if len(pending) <= _ROUNDS_AHEAD:
          continue
      if not pending:
        return
      count, futures = pending.popleft()
      parts = gather_results(lambda f=futures: [x.result() for x in f])
      yield from (parts[i % processes][i // processes] for i in range(count))


def gather_results(function: Callable[[], T]) -> list[T]:
  """Gathers what a function returns in each process.

  Collective: all processes call it. An error in one is raised in all.
  """
  if jax.process_count() == 1:
    return [function()]
  result, failure = None, None
  try:
    result = function()
  except Exception as error:
    failure = error
  outcome = (result, failure and f"{type(failure).__name__}: {failure}")
  parts = [pickle.loads(data) for data in gather_bytes(pickle.dumps(outcome))]
  if failure:
    raise failure
  for process, (_, message) in enumerate(parts):
    if message:
      raise InputError(f"process {process} failed: {message}")
  return [result for result, _ in parts]


def agree(facts: Mapping[str, Any]) -> None:
  """Raises ProcessMismatchError on all processes if JSON values differ.

  The error names the dotted keys that differ, their values and processes.
  Collective: all processes call it.
  """
  differences = list_differences(gather_json(facts))
  if not differences:
    return
  texts = [f"{key} ({_describe_values(values)})" for key, values in differences]
  raise ProcessMismatchError(
    f"The processes of this run differ in {list_first(texts, _MAX_DIFFERENCES)}"
    ". Start all of them with the same command, code, data and workdir."
  )


def _describe_values(values: Sequence[Any]) -> str:
  """Lists the distinct values, each with its processes."""
  processes: dict[str, list[int]] = {}
  for process, value in enumerate(values):
    processes.setdefault(repr(value), []).append(process)
  return "; ".join(
    f"{printable(text, _MAX_CHARACTERS)} on {name_processes(numbers)}"
    for text, numbers in processes.items()
  )


def name_processes(numbers: Sequence[int]) -> str:
  """Text such as "process 1" or "processes 0, 2-4" for ascending numbers."""
  ranges: list[list[int]] = []
  for number in numbers:
    if ranges and ranges[-1][-1] == number - 1:
      ranges[-1].append(number)
    else:
      ranges.append([number])
  texts = [f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges]
  kind = "process" if len(numbers) == 1 else "processes"
  return f"{kind} {list_first(texts, _MAX_RANGES)}"
