"""Evaluation data in a bucket: two processes each read their half."""

import json
import os
import pathlib

import emulators
import jax
import label_samples
import numpy as np
import pytest
import trainings
from dataset_samples import image_bytes, write_tar

from mtv_jax.encoder import baselines
from mtv_jax.evals.datasets import registry
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils import path as path_lib

pytestmark = pytest.mark.slow

COLOURS = ("red", "blue")


def write_sets(root):
  """Eight images each: in folders, in CLIP_benchmark's tars, in ArrayRecord."""
  for i in range(8):
    file = root / "folders" / COLOURS[i // 4] / f"{i}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(image_bytes((i, 0, 0), "png"))
  for tar in range(2):
    rows = range(4 * tar, 4 * tar + 4)
    write_tar(
      root / f"tars/test/{tar}.tar",
      {
        f"s{i}": {"webp": image_bytes((i, 9, 0)), "cls": str(i % 2).encode()}
        for i in rows
      },
    )
  (root / "tars/test/nshards.txt").write_text("2\n")
  (root / "tars/classnames.txt").write_text("red\nblue\n")
  (root / "tars/zeroshot_classification_templates.txt").write_text("{c}\n")
  options = dict(per_shard=2, format="array_record")
  label_samples.make_base(root / "records", count=8, **options)


def evaluate(root):
  """Digests and features of the sets."""
  devices = jax.devices()[: jax.process_count()]
  mesh = make_mesh({"data": len(devices)}, devices)
  encoder = baselines.load("pixels:32/8", mesh=mesh)
  records = f"{root}/records/base/*.array_record"
  sets = [
    registry.open_classification(f"{root}/folders"),
    registry.open_classification(f"{root}/tars"),
    registry.open_captions({"type": "array_record", "path": records}),
  ]
  output = []
  for data in sets:
    features = encoder.image(data.images, outputs=("pooled",), batch_size=4)
    output.append([data.digest, features.pooled.tolist()])
  return output


def write_output(folder, url):
  """Stores one process's output, and the names of the files that it copied."""
  process = jax.process_index()
  cache = pathlib.Path(folder, f"cache{process}")
  os.environ[path_lib.CACHE_VARIABLE] = str(cache)
  output = evaluate(url)
  files = [f for f in cache.rglob("*") if f.is_file() and f.stat().st_blocks]
  output.append(sorted(f.name for f in files))
  pathlib.Path(folder, f"{process}.json").write_text(json.dumps(output))


def test_two_processes_read_their_shares(gs, tmp_path):
  write_sets(tmp_path / "local")
  url = f"{gs}/shares"
  path_lib.upload_folder(tmp_path / "local", path_lib.as_path(url))
  code = """
import sys
sys.path.insert(0, sys.argv[3])
import test_bucket_shares
test_bucket_shares.write_output(*sys.argv[1:3])
"""
  folder = os.path.dirname(__file__)
  with emulators.count_requests() as requests:
    trainings.run_pair(code, str(tmp_path), url, folder, devices=1)
  outputs = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
  copied = [output.pop() for output in outputs]
  assert outputs[0] == outputs[1]
  local = evaluate(tmp_path / "local")
  for (digest, features), expected in zip(outputs[0], local, strict=True):
    assert digest == expected[0]
    np.testing.assert_allclose(features, expected[1], atol=1e-5)
  reads = [p for _, p, _ in requests if "alt=media" in p]
  for suffix, count in ((".png", 8), (".tar", 2), (".array_record", 4)):
    assert sum(suffix in read for read in reads) == count
    names = [[n for n in own if n.endswith(suffix)] for own in copied]
    assert [len(own) for own in names] == [count // 2] * 2
    assert not {*names[0]} & {*names[1]}
