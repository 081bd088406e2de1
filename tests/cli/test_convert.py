"""The command line of tools/convert.py."""

import numpy as np
import pytest

from mtv_jax.cli.main import command
from mtv_jax.convert import huggingface
from mtv_jax.convert import native as native_lib
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.models import two_tower as models
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.tree import flatten_with_names, unflatten_names

main = command("convert")


@pytest.fixture
def native(tmp_path):
  text = {"variant": "mu", "depth": 1, "length": 8, "vocab_size": 258}
  config = {"variant": "mu/16", "image_size": 32, "text": text}
  spec = ModelSpec.from_config(config)
  rng = np.random.default_rng(0)
  leaves = {
    name: rng.normal(size=leaf.shape).astype(np.float32)
    for name, leaf in flatten_with_names(models.abstract_params(spec))
  }
  leaves["heads/contrastive/logit_scale"] = np.float32(2)
  leaves["heads/contrastive/logit_bias"] = np.float32(-9)
  preprocess = {"size": 32, "mean": (0.5,) * 3}
  model = ConvertedModel(spec, unflatten_names(leaves), preprocess)
  return native_lib.write(tmp_path / "native", model)


def _leaves(folder):
  return dict(flatten_with_names(huggingface.read(folder).params))


def test_to_hf_then_from_hf_is_identical(native, tmp_path, capsys):
  out, back = str(tmp_path / "hf"), str(tmp_path / "back")
  main(["to_hf", str(native), out, "--tokenizer=bytes", "--clean=lower"])
  assert "model.safetensors" in capsys.readouterr().out
  main(["from_hf", out, back])
  want, got = _leaves(native), _leaves(back)
  assert got.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
  assert huggingface.read(back).tokenizer.clean == "lower"


def test_image_size_resamples(native, tmp_path):
  out = tmp_path / "hf"
  main(["to_hf", str(native), str(out), "--image_size=64"])
  model = huggingface.read(out)
  assert model.spec.image.image_size == model.preprocess["size"] == 64
  assert model.params["image"]["position_embedding"].shape == (16, 64)


def test_errors_are_messages(native, tmp_path):
  with pytest.raises(SystemExit, match="There is no folder"):
    main(["from_hf", str(tmp_path / "no"), str(tmp_path / "out")])
  with pytest.raises(SystemExit, match="33x33.*32x32"):
    main(["to_hf", str(native), str(tmp_path / "out"), "--image_size=33"])
  with pytest.raises(SystemExit, match="npz is expected"):
    main(["from_big_vision", "no.npz", str(tmp_path / "out")])


def test_a_source_is_never_written_over(native, tmp_path):
  before = {p.name: p.read_bytes() for p in native.iterdir()}
  for direction in ("to_hf", "from_hf"):
    with pytest.raises(SystemExit, match="is the source: name"):
      main([direction, str(native), f"{native}/../native"])
  # A folder never has conversions in two formats: one would hide the other.
  out = tmp_path / "hf"
  main(["to_hf", str(native), str(out)])
  with pytest.raises(
    SystemExit, match=r"another format.* \(model\.safetensors\)"
  ):
    main(["from_hf", str(native), str(out)])
  with pytest.raises(
    SystemExit, match=r"another format.* \(params\.safetensors\)"
  ):
    main(["to_hf", str(out), str(native)])
  assert {p.name: p.read_bytes() for p in native.iterdir()} == before
  assert (out / "config.json").is_file()
