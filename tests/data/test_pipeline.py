"""Order of rows over hosts, workers and steps; bad records."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from mtv_jax.data import order
from mtv_jax.data.order import skip_steps
from mtv_jax.data.pipeline import DataConfig, make_loader
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source
from mtv_jax.data.stats import CorruptDataError, Stats
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.utils.errors import WorkerError

OPS = "decode|canvas(2)|caption(8)"


class Numbers(Source):
  """Record i is a 2 x 2 image of i's digits in base 256, with two captions."""

  fields = frozenset(["key", "image", "captions"])

  def __init__(self, name: str, length: int, bad=(), *, mark: int = 0):
    self.name, self._bad = name, frozenset(bad)
    self._mark = mark
    self.shards = np.array([length])

  def __getitem__(self, i: int) -> dict:
    assert 0 <= i < len(self)
    if i in self._bad:
      raise BadRecord(f"{self.name}-{i}", "is bad")
    image = np.zeros((2, 2, 3), np.uint8)
    image[...] = (i // 256, i % 256, self._mark)
    return {"key": str(i), "image": image, "captions": ["a", "b"]}

  def __repr__(self) -> str:
    return f"Numbers({self.name})"


def numbers(batch: dict) -> list[int]:
  pixels = batch["image"][:, 0, 0].astype(int)
  return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def loader(sources, *, weights=None, **options):
  keys = {field.name for field in dataclasses.fields(DataConfig)}
  config = {"ops": OPS} | {k: v for k, v in options.items() if k in keys}
  config["train"] = [{"weight": w} for w in weights or ()]
  options = {k: v for k, v in options.items() if k not in keys}
  options = {"batch_size": 8, "seed": 0, "sources": sources} | options
  return make_loader(config, tokenizer=build_tokenizer("bytes"), **options)


def take(count: int, sources, **options) -> list[dict]:
  with loader(sources, **options) as batches:
    return list(itertools.islice(batches, count))


def assert_equal(a: list[dict], b: list[dict]) -> None:
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert list(x) == list(y)
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def two_sources():
  return [Numbers("long", 37), Numbers("short", 5, mark=1)]


def test_batch_has_shapes_and_dtypes_of_fields():
  with loader([Numbers("n", 37)]) as batches:
    assert batches.examples_per_epoch == 37
    names = {"image", "image_size", "caption", "caption_valid"}
    assert set(batches.fields) == names
    batch = next(batches)
    assert batches.step == 1
    assert batches.stats.read == 8
  for name, field in batches.fields.items():
    assert batch[name].shape == (8, *field.shape)
    assert batch[name].dtype == field.dtype
  assert (batch["image_size"] == 2).all()
  assert batch["caption_valid"].all()


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_every_epoch_has_every_record_once_in_a_new_order(shuffle):
  # 37 is not a multiple of 8: epochs end inside batches.
  batches = take(3 * 37 // 8 + 1, [Numbers("n", 37)], shuffle=shuffle)
  rows = [n for batch in batches for n in numbers(batch)]
  epochs = [rows[i : i + 37] for i in (0, 37, 74)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(37))
  if shuffle == "none":
    assert epochs == [list(range(37))] * 3
  else:
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(37))


def test_a_source_shorter_than_a_batch():
  (batch,) = take(1, [Numbers("n", 3)])
  counts = collections.Counter(numbers(batch))
  assert sorted(counts.values()) == [2, 3, 3]


@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_hosts_take_slices_of_the_same_batch(shuffle):
  options = {"weights": [2, 1], "shuffle": shuffle}
  whole = take(6, two_sources(), **options)
  for count in (2, 4):
    parts = [
      take(6, two_sources(), process_index=h, process_count=count, **options)
      for h in range(count)
    ]
    together = [
      {name: np.concatenate([p[name] for p in step]) for name in step[0]}
      for step in zip(*parts, strict=True)
    ]
    assert_equal(together, whole)


@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_start_step_equals_iterating(shuffle):
  options = {"weights": [2, 1], "shuffle": shuffle}
  whole = take(12, two_sources(), **options)
  for step in (1, 7, 11):
    rest = take(12 - step, two_sources(), start_step=step, **options)
    assert_equal(rest, whole[step:])


def test_threads_and_prefetching_change_nothing():
  whole = take(6, two_sources(), threads=1, prefetch=1)
  assert_equal(take(6, two_sources(), threads=5, prefetch=4), whole)


def test_seeds_differ():
  runs = [take(6, [Numbers("n", 37)], seed=seed) for seed in (0, 0, 1)]
  assert_equal(runs[0], runs[1])
  orders = [[numbers(b) for b in run] for run in runs]
  assert orders[0] != orders[2]


def test_equal_sources_have_different_orders():
  sources = [Numbers("a", 37), Numbers("b", 37, mark=1)]
  rows = order.addresses(sources, weights=[1.0, 1.0], shuffle="global", seed=0)
  each = {0: [], 1: []}
  for position in range(37 * 6):
    k, record = rows[position]
    each[k].append(record)
  epochs = [tuple(v[i : i + 37]) for v in each.values() for i in (0, 37, 74)]
  assert len(set(epochs)) == 6


def test_captions_are_resampled_every_epoch():
  batches = take(40, [Numbers("n", 8)])
  drawn = np.stack([b["caption"][:, 0] for b in batches])
  share = np.mean(drawn == ord("a") + 2)
  assert 0.4 < share < 0.6
  assert not (drawn == drawn[0]).all()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.7)])
def test_mixture_is_even_throughout(weights):
  rows = order.addresses(
    two_sources(), weights=weights, shuffle="global", seed=3
  )
  share = weights[0] / sum(weights)
  picks = np.cumsum([rows[i][0] == 0 for i in range(1000)])
  assert np.abs(picks - share * np.arange(1, 1001)).max() < 2


def test_rows_have_the_index_of_their_source():
  sources = [Numbers("a", 30), Numbers("b", 50, mark=1)]
  wanted = {"image", "source"}
  batch = next(loader(sources, weights=[1, 1], batch_fields=wanted))
  np.testing.assert_array_equal(batch["source"], batch["image"][:, 0, 0, 2])
  assert {*batch["source"].tolist()} == {0, 1}
  assert "source" not in next(loader(sources, batch_fields={"image"}))


def test_each_source_repeats_by_itself():
  rows = order.addresses(
    two_sources(), weights=(1.0, 1.0), shuffle="global", seed=3
  )
  records = [rows[i][1] for i in range(400) if rows[i][0] == 1]
  for start in range(0, 195, 5):
    assert sorted(records[start : start + 5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [1000, 100_000])
@pytest.mark.parametrize("shuffle", ["global", "block", "none"])
def test_large_positions(length, shuffle):
  rows = order.addresses(
    [Numbers("n", length)], weights=[1.0], shuffle=shuffle, seed=0
  )
  first = (2**33 // length + 1) * length
  sample = [rows[first + i][1] for i in range(1000)]
  assert len(set(sample)) == 1000
  assert 0 <= min(sample) <= max(sample) < length
  step = 2**40
  batches = take(1, [Numbers("n", 1000)], start_step=step, shuffle=shuffle)
  again = take(1, [Numbers("n", 1000)], start_step=step, shuffle=shuffle)
  assert_equal(batches, again)


def test_large_sources_are_shuffled_by_arithmetic():
  length = 70_001
  rows = order.addresses(
    [Numbers("n", length)], weights=[1.0], shuffle="global", seed=0
  )
  epoch = np.array([rows[i][1] for i in range(length)])
  assert (np.sort(epoch) == np.arange(length)).all()
  assert np.abs(np.corrcoef(epoch, np.arange(length))[0, 1]) < 0.02


def test_block_shuffle_keeps_neighbours_together():
  shards = np.cumsum([100, 30, 1, 250, 64])
  shuffled = order.BlockShuffle(shards, seed=1, block=32, window=3)
  for epoch in range(3):
    rows = [shuffled[epoch * 445 + i] for i in range(445)]
    assert sorted(rows) == list(range(445))
    # Three of 16 blocks are mixed at a time; 64 rows touch three such sets.
    starts = sorted(
      {a for lo, hi in zip([0, *shards], shards, strict=False)
       for a in range(lo, hi, 32)}
    )  # fmt: skip
    block = np.searchsorted(starts, rows, side="right")
    assert max(len(set(block[i : i + 64])) for i in range(445)) <= 9
    assert rows != sorted(rows)


def test_a_bad_record_is_replaced_by_the_next_good_one(caplog):
  good = take(10, [Numbers("n", 37)], max_corrupt=0.5)
  with loader([Numbers("n", 37, bad=[4, 5, 36])], max_corrupt=0.5) as batches:
    with caplog.at_level(logging.WARNING):
      bad = list(itertools.islice(batches, 10))
    stats = batches.stats
  replaced = {4: 6, 5: 6, 36: 0}
  for a, b in zip(good, bad, strict=True):
    assert numbers(b) == [replaced.get(n, n) for n in numbers(a)]
    np.testing.assert_array_equal(a["caption"], b["caption"])
  seen = collections.Counter(n for a in good for n in numbers(a))
  assert stats.corrupt == 2 * seen[4] + seen[5] + seen[36]
  assert stats.read == 80 + stats.corrupt
  assert stats.reasons == {f"n/n-{i}": "is bad" for i in (4, 5, 36)}
  assert "n-36" in caplog.text


def test_rows_and_counts_resume_among_bad_records():
  source, options = [Numbers("n", 37, bad=[4, 5, 36])], dict(max_corrupt=0.5)
  with loader(source, **options) as batches:
    rows = list(itertools.islice(batches, 10))
    # Those after step 6, though more batches have been read.
    saved = json.loads(json.dumps(batches.stats_at(6).to_dict()))
    whole = batches.stats.to_dict()
  assert 0 < saved["corrupt"] < whole["corrupt"]
  options |= dict(start_step=6, stats=Stats.from_dict(saved), threads=3)
  with loader(source, **options) as batches:
    assert_equal(list(itertools.islice(batches, 4)), rows[6:])
    assert batches.stats.to_dict() == whole


def test_skipped_batches_shift_the_later_ones():
  whole = take(9, two_sources())
  skipped = skip_steps(2, 3, ())
  assert skipped == ((2, 2),)
  rest = take(4, two_sources(), skipped=skipped)
  assert_equal(rest, [whole[i] for i in (0, 1, 4, 5)])
  # Step 2 of that run is batch 4; without it, step 4 is batch 7.
  more = skip_steps(4, 4, skip_steps(2, 2, skipped))
  assert more == ((2, 3), (7, 1))
  rest = take(5, two_sources(), skipped=more)
  assert_equal(rest, [whole[i] for i in (0, 1, 5, 6, 8)])


def test_too_many_bad_records_stop_the_run_after_an_epoch():
  """When they are too many is in test_stats.py."""
  with loader([Numbers("n", 40, bad=[1, 2])]) as batches:
    for _ in range(4):
      next(batches)
    message = r"(?s)max_corrupt allows 1\.00%.*n/n-"
    with pytest.raises(CorruptDataError, match=message):
      for _ in range(2):
        next(batches)


class Texts(Numbers):
  """Of ten captions, three have nine bytes, six have four, one is missing."""

  def __getitem__(self, i: int) -> dict:
    text = "a" * (9 if i % 10 < 3 else 4)
    captions = [] if i % 10 == 9 else [text]
    return super().__getitem__(i) | {"captions": captions}


@pytest.mark.parametrize("workers", [0, 1])
def test_cut_captions_are_counted_and_warned_of_once(caplog, workers):
  source = [Texts("n", 40)]
  # Room for five bytes and the end.
  ops = "decode|canvas(2)|caption(6)"
  with loader(source, ops=ops, workers=workers) as batches:
    for _ in range(10):
      next(batches)
    stats = batches.stats
    counts = stats.texts["captions"], stats.texts["captions_cut"]
    assert counts == (72, 24) and stats.fraction("cut") == {"captions": 1 / 3}
  (message,) = [r.getMessage() for r in caplog.records if "cut" in r.msg]
  # After as many captions as there are records.
  assert message.startswith("33 % of 42 captions") and "caption(6)" in message
  caplog.clear()
  with loader(source, ops="decode|canvas(2)|caption(10)") as batches:
    for _ in range(10):
      next(batches)
    assert batches.stats.fraction("cut") == {"captions": 0}
  assert not caplog.records


class Phrases(Numbers):
  """Two boxes, whose phrases have three and nine bytes; a caption of nine."""

  fields = Numbers.fields | {"boxes", "phrases"}

  def __getitem__(self, i: int) -> dict:
    boxes = np.array([[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1]], np.float32)
    fields = {"boxes": boxes, "phrases": ["a" * 3, "a" * 9]}
    return super().__getitem__(i) | fields | {"captions": ["a" * 9]}


def test_cut_phrases_are_counted_beside_captions(caplog):
  ops = "decode|canvas(2)|caption(10)|regions(2, 6)"
  with loader([Phrases("n", 40)], ops=ops) as batches:
    for _ in range(5):
      next(batches)
    assert +batches.stats.texts == {
      "captions": 40,
      "phrases": 80,
      "phrases_cut": 40,
    }
    assert batches.stats.fraction("cut") == {"captions": 0, "phrases": 0.5}
  (message,) = [r.getMessage() for r in caplog.records if "cut" in r.msg]
  assert message.startswith("50 % of 48 phrases")
  assert "phrase_length of `regions`" in message


def test_no_good_record_at_all():
  with (
    loader([Numbers("n", 5, bad=range(5))]) as batches,
    pytest.raises(CorruptDataError, match="5 records of Numbers"),
  ):
    next(batches)


# A separate module, which worker processes can import.
PROBE = """
import os, sys
import numpy as np
from mtv_jax.data.records import BadRecord
from mtv_jax.data.sources.base import Source

class Probe(Source):
  name, fields, shards = "n", frozenset(["image"]), np.array([37])

  def __init__(self):
    self.parent = os.getpid()

  def __getitem__(self, i):
    if i in (4, 5, 36):
      raise BadRecord(f"n-{i}", "is bad")
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = bridge is not None and bridge.backends_are_initialized()
    mark = 0 if os.getpid() == self.parent else 1 + started
    image = np.full((2, 2, 3), (0, i, mark), np.uint8)
    return {"key": str(i), "image": image, "captions": ["a", "b"]}
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_rows_and_start_no_backend(
  tmp_path, monkeypatch
):
  (tmp_path / "probe_source.py").write_text(PROBE)
  monkeypatch.syspath_prepend(tmp_path)
  source = importlib.import_module("probe_source").Probe()
  options = {"max_corrupt": 0.5, "start_step": 3}
  threads = take(7, [source], **options)
  with loader([source], workers=2, **options) as batches:
    workers = [
      {name: np.array(values) for name, values in batch.items()}
      for batch in itertools.islice(batches, 7)
    ]
    corrupt, reasons = batches.stats.corrupt, batches.stats.reasons
    for child in multiprocessing.active_children():
      os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="worker processes was killed"):
      collections.deque(batches, maxlen=0)
  # 1: read by another process, in which JAX has started no backend.
  assert all((batch["image"][..., 2] == 1).all() for batch in workers)
  for batch in workers:
    batch["image"][..., 2] = 0
  assert_equal(workers, threads)
  assert corrupt > 0
  assert set(reasons) == {"n/n-4", "n/n-5", "n/n-36"}


def test_other_errors_name_the_record():
  """Errors that are not the record's fault."""
  source = Numbers("n", 6)
  source._bad = None  # Raises a TypeError.
  with (
    loader([source]) as batches,
    pytest.raises(TypeError, match="not (iterable|a container)") as caught,
  ):
    next(batches)
  assert "of Numbers(n) (row 0)" in caught.value.__notes__[0]


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"batch_size": 9, "process_count": 2}, "batch_size=9 .* 2 processes"),
    ({"shuffle": "globe"}, "Did you mean 'global'"),
    ({"weights": [1, 0]}, r"weight is 0, expected a number >= 1e-09 and <="),
    ({"weights": [1, float("nan")]}, "weight is nan, expected a number"),
    ({"weights": [1e-308, 1]}, "weight is 1e-308, expected a number"),
    ({"weights": [1, 1e308]}, r"weight is 1e\+308, expected a number"),
    ({"weights": [1, "a"]}, r"weight is .a., expected a number"),
    ({"workers": -1}, "data.workers is -1"),
    ({"workers": 2**63}, "data.workers is 9223372036854775808, expected"),
    ({"threads": 10**30}, "data.threads is 10*, expected an integer"),
    ({"prefetch": 0}, "data.prefetch is 0"),
    ({"prefetch": 2**31}, "data.prefetch is 2147483648, expected an integer"),
    ({"seed": -1}, "seed=-1"),
  ],
)
def test_invalid_config_is_rejected(options, match):
  with pytest.raises(ValueError, match=match):
    loader(two_sources(), **options)


def test_empty_data():
  with pytest.raises(ValueError, match="at least one source"):
    loader([])
  with pytest.raises(ValueError, match="has no records"):
    loader([Numbers("n", 0)])


def test_close_ends_batches_in_progress():
  started, release = threading.Event(), threading.Event()

  class Waiting(Numbers):
    def __getitem__(self, i: int) -> dict:
      started.set()
      release.wait(10)
      return super().__getitem__(i)

  batches = loader([Waiting("n", 37)], threads=2).batches

  def read(step: int) -> None:
    with contextlib.suppress(concurrent.futures.CancelledError, RuntimeError):
      batches[step]

  readers = [
    threading.Thread(target=read, args=[n], daemon=True) for n in (0, 1)
  ]
  for reader in readers:
    reader.start()
  assert started.wait(10)
  closer = threading.Thread(target=batches.close, daemon=True)
  closer.start()
  release.set()
  for thread in (closer, *readers):
    thread.join(10)
    assert not thread.is_alive()


def test_closed_loader_raises():
  batches = loader([Numbers("n", 37)])
  next(batches)
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)
