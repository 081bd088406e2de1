"""tools/bench.py: each benchmark prints and writes its measurements."""

import json

import numpy as np
import pytest

from mtv_jax.cli.main import run_command
from mtv_jax.data import order
from mtv_jax.data.registry import build_source
from mtv_jax.perf.bench import data, gradient_norms
from mtv_jax.utils.errors import InputError


def run(capsys, tmp_path, *arguments):
  """The JSON and the printed text of a command."""
  path = tmp_path / "result.json"
  run_command("bench", [*arguments, f"--json={path}"])
  return json.loads(path.read_text()), capsys.readouterr().out


def test_data_times_the_pipeline_beside_decoding(tmp_path, capsys):
  result, printed = run(
    capsys, tmp_path, "data", "--size=32", "--batch_size=8", "--batches=2",
    "--rounds=3", "--threads=2",
  )  # fmt: skip
  assert result["images"] == 16 and result["threads"] == 2
  assert len(result["ratios"]) == 3
  assert result["ratio"] == sorted(result["ratios"])[1]
  for name in ("pipeline", "decode"):
    assert result[name]["images_per_second"] > 0
    assert result[name]["cpu_ms"] > 0
  for words in ("images/s", "full pipeline", "decode and resize alone"):
    assert words in printed


def test_gradient_norms_are_those_of_the_log(tmp_path, capsys):
  objectives = {"a": {"weight": 1.0}, "b": {"weight": 0.5}}
  (tmp_path / "config.json").write_text(json.dumps({"objectives": objectives}))
  rows = [
    {"step": step, "a/weight": 2.0, "b/weight": 0.25}
    | {"a/encoder_grad_norm": norm, "b/encoder_grad_norm": 1.0}
    for step, norm in ((10, 50.0), (20, 2.0), (30, 8.0))
  ]
  lines = "\n".join(map(json.dumps, rows))
  (tmp_path / "metrics.jsonl").write_text(lines)
  command = ["gradient_norms", f"--workdir={tmp_path}", "--after=10"]
  result, printed = run(capsys, tmp_path, *command)
  assert result["measurements"] == 2
  np.testing.assert_allclose(result["balanced"]["a"], 4.0)
  np.testing.assert_allclose(result["balanced_ratio"], 4.0)
  np.testing.assert_allclose(result["balanced_largest"], 8.0)
  # a's weight was twice the config's, and b's half.
  assert result["without_factors"] == pytest.approx({"a": 2.0, "b": 2.0})
  assert "0 of 2 above 10" in printed
  with pytest.raises(InputError, match="no gradient norms"):
    gradient_norms.run(str(tmp_path), after=30)


def test_pipeline_and_decoding_read_the_same_images(tmp_path):
  path = data._write_scenes_tar(tmp_path, 32, count=8)
  source = build_source({"type": "webdataset", "path": path})
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  files = data._read_images(source, 3, 8)
  assert files == [source[rows[3 + i][1]]["image"] for i in range(8)]
  assert len(set(files)) > 1


def test_missing_data_raises(tmp_path):
  with pytest.raises(FileNotFoundError, match="matches no file"):
    data.run(str(tmp_path / "*.tar"))


def test_scene_files_has_the_requested_length():
  assert len(data.scene_files(32, 70)) == 70
  assert data.decode_cpu_ms(32, images=8, threads=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "limit", "words"),
  [
    ("step --config=CONFIG --steps=2", "peak", "matrix products alone"),
    ("views --config=CONFIG --steps=2", "decode", "decode and resize"),
    (
      "eval --encoder=random:mu/8@32 --images=16 --batch_size=8",
      "forward",
      "forward alone",
    ),
    ("checkpoint --config=CONFIG --steps=2 --saves=1", "disk", "disk alone"),
  ],
  ids=["step", "views", "eval", "checkpoint"],
)
def test_each_benchmark_measures_its_limit(
  repo_root, tmp_path, capsys, arguments, limit, words
):
  config = repo_root / "tests" / "configs" / "smallest.py"
  trace = tmp_path / "trace"
  result, printed = run(
    capsys,
    tmp_path,
    *arguments.replace("CONFIG", str(config)).split(),
    f"--profile={trace}",
  )
  assert result[limit] and words in printed
  if limit in ("peak", "decode"):
    assert 0 < result["share"] < 1.5
  assert "share" in result
  if limit == "forward":
    ratio = result["by_shape"] / result["one_by_one"]
    assert min(result["batchings"]) <= ratio * 1.01
    assert ratio <= max(result["batchings"]) * 1.01
    assert len(result["batchings"]) == 3
  assert list(trace.rglob("*.xplane.pb"))
