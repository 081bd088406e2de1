"""Dense features of a frozen encoder, in batches for probes and matching."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int

from mtv_jax.encoder.encoder import Encoder
from mtv_jax.encoder.features import block_index
from mtv_jax.evals.core import probe
from mtv_jax.evals.core.global_features import final_norm
from mtv_jax.parallel.distributed import gather_bytes
from mtv_jax.utils.cores import available_cores
from mtv_jax.utils.errors import ConfigError, InputError
from mtv_jax.utils.grouping import Grouper

Encode = Callable[[list[np.ndarray]], Float32[np.ndarray, "n h w c"]]
# Batches of items that a smaller batch of another group may wait for.
_MAX_WAIT = 8
# Items that processes exchange at a time, and exchanges computed in advance.
# Both are equal in all processes, however many cores each has.
_ROUND, _ROUNDS_AHEAD = 16, 2
# The encoder's input, and the labels or the depth of its pixels.
LabelledInput = tuple[np.ndarray, np.ndarray]


def features(
  encoder: Encoder,
  images: Sequence[np.ndarray],
  blocks: Sequence[int],
  *,
  norm: str,
  cls: bool = False,
  batch_size: int,
) -> Float32[np.ndarray, "n h w c"]:
  """Patch tokens of blocks, concatenated along the channels.

  Args:
    encoder: any.
    images: in 0..255, all of one size that the patch divides.
    blocks: counted from 0.
    norm: `final` applies the encoder's final norm, if it has one, to the tokens
      of every block, `none` does not.
    cls: whether to append the block's CLS token to each of its patches.
    batch_size: images per step.
  """
  last = encoder.spec.image.depth - 1
  # The last block's normalised tokens come from the encoder itself.
  raw = tuple(i for i in blocks if norm == "none" or i != last)
  outputs = ("patches", "prefix") if cls else ("patches",)
  out = encoder.dense(
    images,
    layers=raw,
    outputs=outputs if norm == "final" else (),
    batch_size=batch_size,
  )
  columns = []
  for i in blocks:
    patches, prefix = out.patches, out.prefix
    if i in raw:
      patches, prefix = out.layers[i], out.prefix_layers.get(i)
    tokens = [patches]
    if cls:
      tokens.append(np.broadcast_to(prefix[:, None, None, 0], patches.shape))
    if i in raw and norm == "final":
      tokens = [final_norm(encoder, x) for x in tokens]
    columns += tokens
  return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)


def matched_block(layer: int, *, norm: str, depth: int) -> int:
  """The block whose tokens are compared, counted from 0.

  Raises ConfigError for the final norm after another block than the last.
  """
  block = block_index(layer, depth)
  if norm == "final" and block != depth - 1:
    raise ConfigError(
      f"norm='final' with layer={layer}: the final norm follows the last block "
      f"only, -1 or {depth - 1}; use norm='none'"
    )
  return block


def threaded_map(
  function: Callable[[Any], Any], items: Iterable[Any], *, ahead: int = 0
) -> Iterator[Any]:
  """`map` by threads, with results in order and a bounded number pending.

  Items are iterated in the caller's thread; `ahead` results are computed in
  advance, by default twice the threads.
  """
  threads = available_cores()
  pending: collections.deque = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    for item in items:
      pending.append(pool.submit(function, item))
      if len(pending) > (ahead or 2 * threads):
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()


def shared_map(
  function: Callable[[Any], Any], items: Iterable[Any], *, ahead: int = 0
) -> Iterator[Any]:
  """`threaded_map` whose items are divided among the processes of a pod.

  Of P processes each computes every P-th item and gets all results. Every
  process iterates equal items at the same point of the program; an error in one
  of them is raised in all.
  """
  processes, process = jax.process_count(), jax.process_index()
  if processes == 1:
    yield from threaded_map(function, items, ahead=ahead)
    return
  items = iter(items)
  size = processes * -(-_ROUND // processes)
  pending: collections.deque = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(available_cores()) as pool:
    while True:
      if batch := list(itertools.islice(items, size)):
        own = batch[process::processes]
        pending.append((len(batch), [pool.submit(function, x) for x in own]))
        if len(pending) <= _ROUNDS_AHEAD:
          continue
      if not pending:
        return
      count, futures = pending.popleft()
      parts = _gather_results(futures)
      yield from (parts[i % processes][i // processes] for i in range(count))


def _gather_results(
  futures: Sequence[concurrent.futures.Future],
) -> list[list[Any]]:
  """The results of each process, or the error of one of them in all."""
  results, failure = [], None
  try:
    results = [future.result() for future in futures]
  except Exception as error:
    failure = error
  own = (results, failure and f"{type(failure).__name__}: {failure}")
  parts = [pickle.loads(data) for data in gather_bytes(pickle.dumps(own))]
  if failure:
    raise failure
  for process, (_, message) in enumerate(parts):
    if message:
      raise InputError(f"process {process} failed: {message}")
  return [results for results, _ in parts]


def map_by_group(
  function: Callable[[list[Any]], Iterable[Any]],
  items: Iterable[Any],
  group: Callable[[Any], Hashable],
  *,
  batch_size: int,
) -> Iterator[Any]:
  """A function of batches, whose items are of one group, in the items' order.

  Batches are full, but for each group's last one and those that eight batches
  of later items wait for.
  """
  grouper = Grouper(batch_size, max_age=_MAX_WAIT * batch_size)
  results: dict[int, Any] = {}
  due = 0

  def run(batches: Iterable[list[tuple[int, Any]]]) -> None:
    for batch in batches:
      positions, members = zip(*batch, strict=True)
      results.update(zip(positions, function(list(members)), strict=True))

  for position, item in enumerate(items):
    run(grouper.add(position, group(item), item))
    while due in results:
      yield results.pop(due)
      due += 1
  run(grouper.flush())
  for position in sorted(results):
    yield results[position]


def encode_batches(
  encode: Encode, examples: Iterable[LabelledInput], *, batch_size: int
) -> Iterator[probe.FeatureBatch]:
  """`features` and `targets` of examples; the last batch may be smaller."""
  examples = iter(examples)
  while batch := list(itertools.islice(examples, batch_size)):
    inputs, targets = zip(*batch, strict=True)
    yield {"features": encode(list(inputs)), "targets": np.stack(targets)}


def training_batches(
  encode: Encode,
  read: Callable[[int, np.random.Generator], LabelledInput],
  count: int,
  *,
  batch_size: int,
  steps: int,
  seed: int,
) -> Iterator[probe.FeatureBatch]:
  """Batches of augmented examples for `probe.fit`.

  Threads read the next batch while the devices process this one, and each
  process its share of the rows. An example depends only on the seed, the step
  and the row: `read` takes its index, below `count`, and random numbers.
  """
  order = probe.shuffled_batches(count, batch_size=batch_size, seed=seed)

  def read_row(number: int) -> LabelledInput:
    step, row = divmod(number, batch_size)
    rng = np.random.default_rng((seed, step, row))
    return read(int(order(step)[row]), rng)

  rows = range(steps * batch_size)
  examples = shared_map(read_row, rows, ahead=batch_size)
  return encode_batches(encode, examples, batch_size=batch_size)


def cached_batches(
  batches: Iterable[probe.FeatureBatch], *, batch_size: int, seed: int
) -> Callable[[int], probe.FeatureBatch]:
  """Shuffled batches by step, of all rows of `batches` in memory."""
  parts = list(batches)
  rows = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
  order: Callable[[int], Int[np.ndarray, " b"]] = probe.shuffled_batches(
    len(rows["targets"]), batch_size=batch_size, seed=seed
  )
  return lambda step: {k: values[order(step)] for k, values in rows.items()}
