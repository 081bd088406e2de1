"""Label sets written to a bucket, by one host and by eight; one dies."""

import pathlib
import subprocess
import sys

import emulators
import label_hosts
import label_samples
import pytest
from labelling_samples import contents

from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.data.labels.label_writer import LabelWriter
from mtv_jax.utils import path

pytestmark = pytest.mark.slow

SHARDS, PER_SHARD, HOSTS = 8, 24, 8
RECORDS = SHARDS * PER_SHARD


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  return label_samples.make_base(folder, count=RECORDS, per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
  """The set that one process writes to a folder."""
  out = tmp_path_factory.mktemp("alone") / "out"
  label_hosts.write(base, out)
  return contents(out)


def test_writing_resumes(bucket, base, alone):
  out = f"{bucket}/resumed"
  store = bucket.partition(":")[0]
  with emulators.count_requests(store) as requests:
    label_hosts.write(base, out)
  # 13.5 to 13.7 a part on a slow machine; s3fs asks for sizes.
  parts = RECORDS / label_hosts.PART
  assert len(requests) < {"gs": 14, "s3": 17}[store] * parts
  assert contents(out) == alone
  assert len(LabelSet(out, kind="depth")) == RECORDS
  source = label_samples.open_base(base)
  with pytest.raises(FileExistsError, match="settings.a: absent -> 1"):
    LabelWriter(out, kind="depth", base=source, settings={"a": 1})
  # Without a shard's file, only this shard is written.
  path.remove(path.as_path(f"{out}/00002.blocks"))
  writer = LabelWriter(out, kind="depth", base=source, settings={})
  assert list(writer.todo()) == [2]
  label_hosts.write(base, out)
  assert contents(out) == alone


@pytest.mark.parametrize(
  "lost",
  [
    70,
    *(
      pytest.param(moment, marks=pytest.mark.long)
      for moment in (0, 3, 20, 41, 63, 90, 117, 140, 160, 180)
    ),
  ],
)
def test_a_lost_host_costs_one_part(gs, base, alone, tmp_path, lost):
  """Eight processes write to a bucket; one is killed at this record."""
  log, out = tmp_path / "log", f"{gs}/lost{lost}"
  script = pathlib.Path(label_hosts.__file__)
  process = subprocess.run(
    [sys.executable, script, base, out, log, str(HOSTS), str(lost)],
    cwd=script.parents[1],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  labelled = label_hosts.read_log(log)
  assert {number for _, number in labelled} == set(range(RECORDS))
  assert len(labelled) - RECORDS <= label_hosts.PART
  assert len({host for host, _ in labelled}) > HOSTS // 2
  assert contents(out) == alone
