"""`mtv-jax bench`: each benchmark prints and writes its measurements."""

import itertools
import json
import sys

import numpy as np
import pytest
from dataset_samples import write_members

from mtv_jax.cli.main import run_command
from mtv_jax.data import order
from mtv_jax.data.registry import build_source
from mtv_jax.perf.bench import (
  against_torch,
  data,
  decoding,
  experts,
  harness,
  step,
)
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


def test_data_samples_the_gil(tmp_path, monkeypatch):
  """With a py-spy that finds the GIL in one of four samples."""
  spy = tmp_path / "py-spy"
  spy.write_text(
    "#!/bin/sh\n"
    "for a in $@; do case $a in --output=*) out=${a#--output=};; esac; done\n"
    'case "$*" in *--gil*) echo "main;row 1";; *) echo "main;row 4";; esac'
    ' > "$out"\n'
  )
  spy.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  result = data.run(size=32, batch_size=8, batches=1, rounds=1, spy=1)
  assert result["gil_share"] == 0.25 and result["main_cpu_ms"] > 0
  assert "of them under the GIL (25%)" in str(result)
  spy.write_text("#!/bin/sh\nexit 1\n")
  with pytest.raises(InputError, match="can't read this process"):
    data._sample_gil(itertools.repeat({}), 1)
  monkeypatch.setenv("PATH", "")
  with pytest.raises(InputError, match="pip install py-spy"):
    data._sample_gil(itertools.repeat({}), 1)


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
    step.measure_norms(str(tmp_path), after=30)


def test_pipeline_and_decoding_read_the_same_images(tmp_path):
  path = data._write_scenes_tar(tmp_path, 32, count=8)
  source = build_source({"type": "webdataset", "path": path})
  rows = order.addresses([source], weights=[1.0], shuffle="global", seed=0)
  files = data._read_images(source, 3, 8)
  assert files == [source[rows[3 + i][1]]["image"] for i in range(8)]
  assert len(set(files)) > 1


def test_scene_files_has_the_requested_length(tmp_path):
  assert len(data.make_scene_files(32, 70)) == 70
  assert data.measure_decode_cpu_ms(32, images=8, threads=1) > 0
  with pytest.raises(FileNotFoundError, match="matches no file"):
    data.run(str(tmp_path / "*.tar"))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "limit", "words"),
  [
    ("step --config=CONFIG --steps=3", "peak", "matrix products alone"),
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
  if limit == "peak":
    assert result["steps"] == 3 and result["batch_size"] == 16
    assert 0 < result["step_ms"] < 1e3 * result["compile_seconds"]
    assert 0 <= result["wait"] < 1 and "waiting for data" in printed
    # All three steps together take longer than the median one.
    seconds = 16 * 3 / result["images_per_second"]
    assert seconds * 1e3 >= result["loop_ms"]
    assert result["devices"].startswith("8 x ")
  if limit == "forward":
    ratio = result["by_shape"] / result["one_by_one"]
    assert min(result["batchings"]) <= ratio * 1.01
    assert ratio <= max(result["batchings"]) * 1.01
    assert len(result["batchings"]) == 3
  assert list(trace.rglob("*.xplane.pb"))


INTEL = "model name\t: A Processor\nflags\t\t: fpu {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
  ("flags", "has"), [("avx2", "without"), ("avx512f avx2", "with")]
)
def test_results_name_the_processor(flags, has):
  text = harness.describe_processor(INTEL.format(flags))
  assert text == f"A Processor {has} AVX-512"
  result = harness.BenchResult(batch_size=2)
  result.add("seconds", 0.5, "step", "{:.1f} s")
  title, row = str(result).splitlines()
  assert title.startswith("batch size 2, processor ")
  assert title.endswith(harness.describe_processor())
  assert row == "step  0.5 s"


@pytest.mark.reference
def test_canvases_are_timed_beside_views_of_the_same_files(tmp_path, capsys):
  result, printed = run(
    capsys, tmp_path, "decoding", "--size=64", "--megapixels=0,1",
    "--images=2", "--rounds=3",
  )  # fmt: skip
  for key, title in (("0", "unchanged"), ("1", "1 megapixels")):
    ratios = result[f"{key}_canvas_ratios"]
    assert len(ratios) == 3
    assert result[f"{key}_canvas_ratio"] == sorted(ratios)[1]
    times = result[key]["cpu_ms"]
    assert 0 < times["canvas"] < times["views"]
    assert title in printed
  # An eighth of the resolution takes less than all of it.
  assert result["1"]["cpu_ms"]["canvas"] < result["1"]["cpu_ms"]["exact"]


@pytest.mark.reference
def test_views_have_the_sizes_of_dinov2():
  (file,) = decoding._read_files(None, 64, 1)
  views = harness.import_oracle("dinov2_views").make_dinov2_views()(file)
  assert [v.shape[-1] for v in views] == [224] * 2 + [96] * 8


@pytest.mark.parametrize(
  "text", ["", "one", "1,-4", "nan", "0,inf", "1e-9", "1e9"]
)
def test_megapixels_that_are_no_sizes(text):
  with pytest.raises(InputError, match="megapixels"):
    decoding._parse_megapixels(text)


def test_photos_need_no_captions(tmp_path):
  write_members(tmp_path / "photos.tar", {"a.jpg": b"photo"})
  files = decoding._read_files(str(tmp_path / "photos.tar"), 64, 4)
  assert files == [b"photo"]


@pytest.mark.reference
def test_speed_and_difference_of_two_sides(monkeypatch):
  pytest.importorskip("transformers")

  class Model:
    @staticmethod
    def make_run_fn(variant, folder, batch_size):
      del folder
      return lambda: np.full((batch_size, 2), 1.0)

  def write(variant, folder):
    assert folder.is_dir() and variant == "S"
    return "model"

  def run(model, batch_size):
    assert model == "model"
    return lambda: np.full((batch_size, 2), 1.25)

  oracle = harness.import_oracle("transformers_experts")
  monkeypatch.setitem(oracle.WRITE, "depth", write)
  monkeypatch.setitem(oracle.RUN, "depth", run)
  monkeypatch.setattr(harness, "import_oracle", lambda name: oracle)
  monkeypatch.setitem(experts.MODELS, "depth", Model)
  monkeypatch.setattr(experts.jax, "local_device_count", lambda: 1)
  result = experts.run("depth", batch_size=3, rounds=2)
  assert result["difference"] == pytest.approx(0.2)
  assert result["batch_size"] == 3 and len(result["speeds"]) == 2
  assert "our speed over theirs" in str(result)
  assert json.loads(result.to_json())["variant"] == "S"


@pytest.mark.slow
def test_experts_run_without_transformers(monkeypatch):
  monkeypatch.setattr(experts, "SIZE", 28)
  result = experts.run("depth", variant="mu", rounds=1, against="none")
  assert result["theirs"] is None and result["ours"] > 0
  assert "transformers" not in str(result)


@pytest.mark.reference
def test_experts_compile_for_a_tpu(monkeypatch):
  pytest.importorskip("libtpu")
  monkeypatch.setattr(experts, "SIZE", 56)
  result = experts.compile_expert(
    "depth", variant="mu", batch_size=2, topology="v5e:2x2"
  )
  assert result["flops"] > 1e6
  used = result["arguments"] + result["temporaries"]
  assert 0 < used < result["memory"]
  assert "FLOPs per image" in str(result)
  json.loads(result.to_json())


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.parametrize(
  ("what", "small"),
  [
    (
      "siglip",
      dict(
        image_size=64,
        text=dict(variant="S", depth=2, length=64, vocab_size=512),
      ),
    ),
    ("distillation", dict(image_size=64, local=32, prototypes=256)),
  ],
)
def test_first_losses_are_equal(what, small):
  pytest.importorskip("open_clip")
  result = against_torch.compare(
    what, batch_size=4, rounds=1, threads=1, depth=2, **small
  )
  ours, theirs = result["losses"]
  assert ours == pytest.approx(theirs, rel=1e-5)
  trained = result["parameters"]
  assert trained[0] == trained[1]
  assert result["speed"] == pytest.approx(result["torch"] / result["ours"])
  assert "our speed over PyTorch's" in str(result)


def test_a_missing_oracle_is_named_with_its_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "open_clip", None)
  with pytest.raises(ImportError, match=r"pip install 'mtv_jax\[reference\]'"):
    against_torch.compare("siglip", batch_size=1, rounds=1, threads=1)


def test_unknown_subjects_raise():
  with pytest.raises(ValueError, match="Did you mean 'siglip'"):
    against_torch.compare("siglib", batch_size=1, rounds=1, threads=1)
  with pytest.raises(ValueError, match="depth"):
    experts.run("dept")
