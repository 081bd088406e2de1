"""Requests, bytes and memory of a run's data, against a counting emulator."""

import dataclasses
import json

import emulators
import label_samples
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.data.pipeline import DataConfig, make_loader
from mtv_jax.data.tokenizers import build_tokenizer
from mtv_jax.perf import data_plane, topologies
from mtv_jax.utils import path

pytestmark = pytest.mark.slow

RECORDS, BATCH, HOSTS = 1024, 64, 4
OPS = "decode|canvas(8)|depth(8)|regions(4)"


@pytest.fixture(scope="module")
def train(gs, tmp_path_factory):
  """Tars of 64 records a block, with two label sets, in a bucket."""
  folder = tmp_path_factory.mktemp("local")
  tars = label_samples.make_base(folder, count=RECORDS, per_shard=128)
  base = label_samples.open_base(tars)
  url = path.as_path(f"{gs}/plane")
  for kind in ("depth", "boxes"):
    label_samples.make_set(folder / kind, base, kind)
  for name in ("base", "depth", "boxes"):
    path.upload_folder(folder / name, url / name)
  labels = {kind: f"{url}/{kind}" for kind in ("depth", "boxes")}
  tars = f"{url}/base/*.tar"
  return (dict(type="webdataset", path=tars, labels=labels),)


def config(train, **options):
  options = dict(shuffle="lanes", lanes=8, window=64) | options
  return DataConfig(train=train, ops=OPS, **options)


def compute(train, **options):
  return data_plane.compute(
    config(train, **options),
    batch_size=BATCH,
    hosts=HOSTS,
    examples_per_second=1000.0,
  )


def read(train, steps, *, host):
  """Reads batches of a host; returns paths and bytes of ranges, and others."""
  with (
    emulators.count_requests() as requests,
    make_loader(
      config(train),
      batch_size=BATCH,
      seed=0,
      process_index=host,
      process_count=HOSTS,
      tokenizer=build_tokenizer("bytes"),
    ) as loader,
  ):
    for _ in range(steps):
      next(loader)
  ranges = [size for _, p, size in requests if "/o/" in p and "alt=media" in p
            and ("tar" in p or ".blocks" in p)]  # fmt: skip
  return ranges, len(requests) - len(ranges)


def test_requests_and_bytes_are_those_of_a_run(train):
  plane = compute(train)
  steps = RECORDS // BATCH
  ranges, others = [], 0
  for host in range(HOSTS):
    of_host, start = read(train, steps, host=host)
    ranges, others = ranges + of_host, others + start
  assert len(ranges) >= RECORDS * plane.requests_per_example
  assert plane.requests_per_example == 3 / 64
  assert sum(ranges) / len(ranges) == pytest.approx(
    plane.bytes_per_example / plane.requests_per_example, rel=0.05
  )
  assert plane.start_requests <= others / HOSTS <= 2 * plane.start_requests
  assert 1 <= plane.largest_share <= 1.05
  # Two windows of a block.
  assert plane.ahead_bytes == pytest.approx(2 * plane.window_bytes, rel=0.05)
  assert not plane.warnings


def test_shards_that_are_copied(gs, tmp_path, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  options = dict(per_shard=16, format="array_record")
  base = label_samples.make_base(tmp_path, count=256, **options)
  url = path.as_path(f"{gs}/copied")
  path.upload_folder(base, url)
  files = f"{url}/*.array_record"
  plane = compute((dict(type="array_record", path=files),), window=16)
  # Two windows of a shard, on the disk instead of in memory.
  largest = sorted(f.stat().st_size for f in base.glob("*.array_record"))
  lanes = 8 // HOSTS
  assert 0 < plane.shard_bytes <= sum(largest[-2 * lanes :])
  assert plane.window_bytes == plane.ahead_bytes == 0
  assert plane.requests_per_example == 1 / 16
  assert "disk for copied shards" in str(plane)


def test_warnings(train, monkeypatch):
  monkeypatch.setattr(data_plane, "_SAMPLES", 1)  # More meet blocks again.
  single = compute(train, shuffle="global", lanes=1)
  # A tar's block, and those of both label sets.
  assert single.requests_per_example == 3
  monkeypatch.setattr(data_plane, "INITIAL_READS", 2999)
  (warning,) = single.warnings
  assert "serves about 2,999 reads/s at first" in warning
  large = dataclasses.replace(single, window_bytes=2, block_memory=1)
  assert any("exceed data.block_memory" in text for text in large.warnings)


def test_preflight_reports_it(train, tmp_path, capsys, monkeypatch):
  # The tests' JAX has eight CPU devices already.
  monkeypatch.setattr(topologies, "use_cpu", lambda topology: None)
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from mtv_jax.config.recipes import read_config\n"
    "def get_config(arg=None):\n"
    "  config = read_config('siglip_b16_224:tiny')\n"
    f"  config.data.train = {list(train)!r}\n"
    "  config.data.shuffle = 'lanes'\n"
    "  return config\n"
  )
  command = [f"--config={recipe}", "--topology=cpu:8", "--data"]
  command += ["--step_seconds=0.5", f"--json={tmp_path / 'report.json'}"]
  assert run_command("preflight", command) == 0
  assert "requests/s" in capsys.readouterr().out
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["data_plane"]["examples_per_second"] == 128
