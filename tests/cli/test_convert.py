"""The command line of `mtv-jax convert`."""

import errno
import functools
import shutil
from unittest import mock

import numpy as np
import pytest

import mtv_jax
from mtv_jax.cli.main import run_command
from mtv_jax.convert import huggingface
from mtv_jax.convert import native as native_lib
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils import atomic, path
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

main = functools.partial(run_command, "convert")


@pytest.fixture
def native(tmp_path):
  return _write_native(tmp_path / "native")


def _write_native(folder, vocab_size=258, seed=0):
  text = {"variant": "mu", "depth": 1, "length": 8, "vocab_size": vocab_size}
  config = {"variant": "mu/16", "image_size": 32, "text": text}
  spec = ModelSpec.from_config(config)
  rng = np.random.default_rng(seed)
  leaves = {
    name: rng.random(leaf.shape, np.float32)
    for name, leaf in flatten_with_names(models.abstract_params(spec))
  }
  leaves["heads/contrastive/logit_scale"] = np.float32(2)
  leaves["heads/contrastive/logit_bias"] = np.float32(-9)
  preprocess = {"size": 32, "mean": (0.5,) * 3}
  model = ConvertedModel(spec, unflatten_names(leaves), preprocess)
  return native_lib.write(folder, model)


def _leaves(folder):
  return dict(flatten_with_names(huggingface.read(folder).params))


def _check_round_trip(native, out, back):
  main(["to_hf", str(native), out, "--tokenizer=bytes", "--clean=lower"])
  main(["from_hf", out, back])
  want, got = _leaves(native), _leaves(back)
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_to_hf_then_from_hf_is_identical(native, tmp_path, capsys):
  out, back = str(tmp_path / "hf"), str(tmp_path / "back")
  _check_round_trip(native, out, back)
  assert "model.safetensors" in capsys.readouterr().out
  assert huggingface.read(back).tokenizer.clean == "lower"


def test_image_size_resamples(native, tmp_path):
  out = str(tmp_path / "hf")
  main(["to_hf", str(native), out, "--image_size=64"])
  model = huggingface.read(out)
  assert model.spec.image.image_size == model.preprocess["size"] == 64
  assert model.params["image"]["position_embedding"].shape == (16, 64)
  for arguments, message in (
    (["from_hf", f"{tmp_path}/no", out], "There is no folder"),
    (["to_hf", str(native), out, "--image_size=33"], "33x33.*32x32"),
    (["from_big_vision", "no.npz", out], "expected an .npz"),
  ):
    with pytest.raises(SystemExit, match=message):
      main(arguments)


def test_a_source_is_never_written_over(native, tmp_path):
  before = {p.name: p.read_bytes() for p in native.iterdir()}
  for direction in ("to_hf", "from_hf"):
    with pytest.raises(SystemExit, match="is the source: name"):
      main([direction, str(native), f"{native}/../native"])
  # A folder never has conversions in two formats: one would hide the second.
  out = tmp_path / "hf"
  main(["to_hf", str(native), str(out)])
  for name, arguments in (
    ("model", ["from_hf", str(native), str(out)]),
    ("params", ["to_hf", str(out), str(native)]),
  ):
    match = rf"another format.* \({name}\.safetensors\)"
    with pytest.raises(SystemExit, match=match):
      main(arguments)
  assert {p.name: p.read_bytes() for p in native.iterdir()} == before
  assert (out / "config.json").is_file()


def test_a_failed_conversion_leaves_the_old_one(native, tmp_path, monkeypatch):
  out = tmp_path / "hf"
  main(["to_hf", str(native), str(out)])
  before = {p.name: p.read_bytes() for p in out.iterdir()}
  # What a killed one leaves (tests/utils/test_atomic.py) is not a model.
  left = shutil.copytree(out, atomic.temporary_path(out))
  with pytest.raises(ConversionError, match="unfinished conversion"):
    huggingface.read(left)
  other = _write_native(tmp_path / "other", vocab_size=300, seed=1)
  error = OSError(errno.ENOSPC, "full")
  with monkeypatch.context() as patch:
    patch.setattr(atomic, "_exchange_folders", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit, match="full"):
      main(["to_hf", str(other), str(out)])
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before
  main(["to_hf", str(other), str(out)])
  table = huggingface.read(out).params["text"]["token_embedding"]
  assert table.shape == (300, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_to_and_from_buckets(native, bucket, tmp_path, monkeypatch):
  monkeypatch.setenv(path.CACHE_VARIABLE, str(tmp_path / "cache"))
  out, back = f"{bucket}/hf", f"{bucket}/native"
  _check_round_trip(native, out, back)
  images = [np.full((40, 48, 3), 90, np.uint8)]
  expected = mtv_jax.load(native).image(images).pooled
  for folder in (out, back):
    actual = mtv_jax.load(folder).image(images).pooled
    np.testing.assert_array_equal(actual, expected)
  # Again, over the earlier conversion; not over another one.
  main(["to_hf", back, out])
  assert sorted(path.list_folder(out)) == sorted(
    p.name for p in path.local_copy(out).iterdir()
  )
  with pytest.raises(SystemExit, match="another format's conversion"):
    main(["to_hf", out, back])
  # An incomplete upload is not a model.
  path.remove(path.as_path(out) / "config.json")
  with pytest.raises(SystemExit, match=r"lacks a config\.json"):
    main(["from_hf", out, f"{bucket}/third"])


@pytest.mark.parametrize(
  "argv",
  ["report runs/a --output=gs://b/report", "preflight --json=s3://b/a.json"],
)
def test_other_outputs_are_folders(argv):
  command, *arguments = argv.split()
  with pytest.raises(SystemExit, match="writes files and folders only"):
    run_command(command, arguments)
