"""The command `label`: options, exit status, and real experts."""

import contextlib
import functools
import json
import signal
import subprocess

import label_samples
import numpy as np
import pytest
from labelling_samples import FakeDepth, contents, launch, make_tars

from mtv_jax.cli import label
from mtv_jax.cli.main import run_command
from mtv_jax.config import origin
from mtv_jax.data.labels.label_sets import LabelSet
from mtv_jax.experts import build
from mtv_jax.utils import path as path_lib

main = functools.partial(run_command, "label")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  return make_tars(tmp_path_factory.mktemp("tars") / "base", shards=2)


def arguments(base, out, *more, expert="depth", weights="x"):
  return [
    f"--expert={expert}", f"--weights={weights}", f"--data={base}/*.tar",
    f"--output={out}", "--threads=2", *more,
  ]  # fmt: skip


def test_the_tool_labels(base, tmp_path, monkeypatch, capsys):
  asked = []

  def fake(kind, weights, *, options):
    asked.append((kind, weights, dict(options)))
    return FakeDepth(scale=options.get("scale", 2.0))

  monkeypatch.setattr(label, "build_expert", fake)
  argv = arguments(base, tmp_path)
  given = ["--side=64", "--batch_size=2", "--set=scale=2.0", "--set=name=a/b"]
  assert main([*argv, *given]) == 0
  # Unset options have the expert's defaults.
  options = {"side": 64, "batch_size": 2, "scale": 2.0, "name": "a/b"}
  assert asked == [("depth", "x", options)]
  output = capsys.readouterr()
  assert f"11 of 14 records have a label, in {tmp_path}." in output.out
  assert "1 times: record: its image in N.tar has no bytes" in output.out
  assert "100% 14 of 14 images" in output.err
  # Again: nothing to do.
  before = contents(tmp_path)
  assert main(argv) == 0
  assert contents(tmp_path) == before
  with pytest.raises(SystemExit, match=r"settings.scale: 2.0 -> 5.0"):
    main([*argv, "--set=scale=5.0"])
  assert origin.read_file(tmp_path / origin.FILE) == origin.Origin(name="x")
  label_set = LabelSet(tmp_path, kind="depth")
  assert label_set.manifest["labelled"] == 11


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (["--set=x"], "label: --set=x: expected OPTION=VALUE"),
    (["--processes=2"], "label: --coordinator, --processes and --process go"),
    ([], "label: No weights at x. Expected: a folder of Depth Anything"),
  ],
)
def test_invalid_commands(base, tmp_path, more, message):
  with pytest.raises(SystemExit, match=message):
    main(arguments(base, tmp_path / "out", *more))
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(tmp_path, monkeypatch, gs, capsys):
  """As on a pod; the result is that of local files."""
  base = label_samples.make_base(tmp_path)
  monkeypatch.setattr(label, "build_expert", lambda *a, **k: FakeDepth())
  assert main(arguments(base, tmp_path / "out")) == 0
  for file in base.glob("*.tar"):
    path_lib.upload(file, path_lib.as_path(f"{gs}/web/{file.name}"))
  argv = arguments(f"{gs}/web", f"{gs}/web_depth")
  assert run_command("index", [f"{gs}/web/*.tar", "--processes=1"]) == 0
  assert main(argv) == 0
  assert contents(f"{gs}/web_depth") == contents(tmp_path / "out")


@pytest.mark.slow
def test_an_interrupt_leaves_no_partial_file(tmp_path):
  base = make_tars(tmp_path / "base", shards=20, records=6)
  out = tmp_path / "out"
  process = launch("depth", base, out, delay=0.1)
  assert process.stdout.readline() == "ready\n"
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(timeout=1.5)
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == 130
  assert errors.strip().splitlines()[-1] == "label: interrupted."
  assert "Traceback" not in errors
  left = sorted(file.name for file in out.iterdir())
  assert "settings.json" in left and "manifest.json" not in left
  assert not [name for name in left if name.startswith(".")]
  # A shard's statistics are its last file: the interrupt may come before it.
  labels = {name.split(".")[0] for name in left if ".blocks" in name}
  finished = {name[:5] for name in left if "_stats" in name}
  assert finished <= labels and len(labels - finished) <= 1
  process = launch("depth", base, out, delay=0)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert len(LabelSet(out, kind="depth").names) == 20


def folder(path, **config):
  path.mkdir()
  (path / "config.json").write_text(json.dumps(config))
  return path


def test_weights_select_the_expert(tmp_path, monkeypatch):
  called = []

  class Module:
    @staticmethod
    def load_expert(path, *, kind="", mesh=None, side=128, phrases=None):
      called.append((path, kind, side, phrases))
      return FakeDepth()

  names = []
  load = lambda name: names.append(name) or Module  # noqa: E731
  monkeypatch.setattr(build.importlib, "import_module", load)
  onnx = tmp_path / "x.onnx"
  onnx.touch()
  for path, module in (
    (folder(tmp_path / "a", model_type="depth_anything"), "depth_anything"),
    (folder(tmp_path / "b", model_type="owlv2"), "owlv2"),
    (folder(tmp_path / "c", model={}), "mtv_expert"),
    (folder(tmp_path / "d", model_type="siglip"), "mtv_expert"),
    (onnx, "onnx_detector"),
  ):
    build.build_expert("depth", path, options={"side": 7})
    assert names[-1] == f"mtv_jax.experts.{module}"
  assert called[0] == (tmp_path / "a", "depth", 7, None)
  for kind, option, message in (
    ("boxes", None, "labels depth, not boxes"),
    ("depth", "sied", "no option 'sied'. Did you mean 'side'"),
    ("depth", "mesh", "no option 'mesh'"),
    ("depth", "kind", "no option 'kind'"),
    ("box", None, "expert is 'box'.*'boxes'"),
  ):
    with pytest.raises(ValueError, match=message):
      build.build_expert(kind, onnx, options={option: 7} if option else {})
  # Phrases by their name, with their own options.
  options = {"phrases": "tags:words", "max_phrases": 3}
  build.build_expert("depth", onnx, options=options)
  assert called[-1][3].settings == {
    "source": "tags", "field": "words", "max_phrases": 3,
  }  # fmt: skip


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (None, "lacks config.json"),
    ('{"model_type":', r"can't be read \(.*Expecting value.*copy it"),
    ('{"model_type": "siglip"}', "is 'siglip', not 'depth_anything'"),
  ],
)
def test_incomplete_weights_are_reported_first(tmp_path, config, message):
  if config:
    (tmp_path / "config.json").write_text(config)
  with pytest.raises(ValueError, match=rf"no option 'size'[^$]*{message}"):
    build.build_expert("depth", tmp_path, options={"size": 56})
  file = tmp_path / "model.safetensors"
  file.touch()
  with pytest.raises(ValueError, match="it is a file.*pass the folder"):
    build.build_expert("depth", file, options={"size": 56})


def test_types_of_options(tmp_path):
  (tmp_path / "x.onnx").touch()
  with pytest.raises(ValueError, match=r"onnx_detector.names is missing"):
    build.build_expert("boxes", tmp_path / "x.onnx")
  for key, value, expected in (
    ("max_boxes", 2.5, "expected an integer"),
    ("max_boxes", 0, "expected an integer >= 1"),
    ("nms", "much", "expected a number"),
    ("nms", 1.5, "expected a number >= 0 and <= 1"),
    ("min_side", 16, "expected a number >= 0 and <= 1"),
    ("decoder", None, "expected a string"),
  ):
    options = {"names": "x", key: value}
    with pytest.raises(ValueError, match=f"{key} is {value!r}, {expected}"):
      build.build_expert("boxes", tmp_path / "x.onnx", options=options)


def write_weights(path):
  """A Depth Anything of random weights."""
  import torch
  import transformers

  torch.manual_seed(0)
  backbone = transformers.Dinov2Config(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2,
    image_size=56, patch_size=14, out_indices=[1, 2, 3, 4],
    reshape_hidden_states=False,
  )  # fmt: skip
  config = transformers.DepthAnythingConfig(
    backbone_config=backbone, reassemble_hidden_size=32, patch_size=14,
    neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, head_hidden_size=8,
  )  # fmt: skip
  model = transformers.DepthAnythingForDepthEstimation(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.0, 0.2)
    # Makes the predicted depth positive.
    model.head.conv3.bias.fill_(9.0)
  model.save_pretrained(path)
  return path


@pytest.mark.reference
@pytest.mark.slow
def test_a_real_expert_through_the_tool(tmp_path, capsys):
  """Images of three shapes, by Depth Anything."""
  weights = write_weights(tmp_path / "weights")
  base = make_tars(tmp_path / "base", shards=2)
  argv = arguments(
    base, tmp_path / "a", "--size=28", "--side=32", weights=weights
  )
  assert main(argv) == 0
  label_set = LabelSet(tmp_path / "a", kind="depth")
  maps = [label_set.read(1, at).label.values for at in range(7)]
  assert len({values.tobytes() for values in maps}) == 7
  assert all(np.ptp(values) == 65534 for values in maps)
  with pytest.raises(SystemExit, match="side: 32 -> 16"):
    main([*argv[:-1], "--side=16"])
