"""tools/bench.py data: both are timed on the same images, and said."""

import json
import runpy

import pytest

from mtv_jax.data import order
from mtv_jax.data.registry import build_source
from mtv_jax.perf.bench import data


def test_data_is_timed_beside_decoding_alone(repo_root, tmp_path, capsys):
  main = runpy.run_path(str(repo_root / "tools" / "bench.py"))["main"]
  out = tmp_path / "speed.json"
  main(
    ["data", "--size=32", "--batch-size=8", "--batches=2", "--rounds=3"]
    + ["--threads=2", f"--json={out}"]
  )
  found = json.loads(out.read_text())
  assert found["images"] == 16 and found["threads"] == 2
  assert len(found["ratios"]) == 3
  assert found["ratio"] == sorted(found["ratios"])[1]
  for name in ("pipeline", "decode"):
    assert found[name]["images_per_second"] > 0
    assert found[name]["cpu_ms"] > 0
  printed = capsys.readouterr().out
  for words in ("images/s", "full pipeline", "decode and resize alone"):
    assert words in printed


def test_both_do_the_same_images(tmp_path):
  path = data._scenes_tar(tmp_path, 32, count=8)
  source = build_source({"type": "webdataset", "path": path})
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  files = data._files(source, 3, 8)
  assert files == [source[rows[3 + i][1]]["image"] for i in range(8)]
  assert len(set(files)) > 1


def test_what_can_not_be_timed_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="matches no file"):
    data.bench_data(str(tmp_path / "*.tar"))


def test_scenes_to_decode_are_as_many_as_asked_for():
  assert len(data.scene_files(32, 70)) == 70
  assert data.decode_alone(32, images=8, threads=1).cpu_ms > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "share"),
  [
    (["step", "--config=CONFIG", "--steps=2"], "share"),
    (["views", "--config=CONFIG", "--steps=2"], "share"),
    (["eval", "--model=random:mu/8@32", "--images=16", "--batch-size=8"], None),
    (["checkpoint", "--config=CONFIG", "--steps=2", "--saves=1"], None),
  ],
  ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_each_is_measured_beside_its_floor(
  repo_root, tmp_path, capsys, arguments, share
):
  main = runpy.run_path(str(repo_root / "tools" / "bench.py"))["main"]
  config = repo_root / "tests" / "configs" / "smallest.py"
  out, trace = tmp_path / "speed.json", tmp_path / "trace"
  arguments = [a.replace("CONFIG", str(config)) for a in arguments]
  main([*arguments, f"--json={out}", f"--profile={trace}"])
  found = json.loads(out.read_text())
  printed = capsys.readouterr().out
  floors = {
    "step": ("peak", "matrix products alone"),
    "views": ("decode", "decode and resize"),
    "eval": ("forward", "forward alone"),
    "checkpoint": ("disk", "disk alone"),
  }
  key, words = floors[arguments[0]]
  assert found[key] and words in printed
  assert "share" in found
  if share:
    assert 0 < found[share] < 1.5
  assert list(trace.rglob("*.xplane.pb"))
