"""StableHLO exports: a process with JAX alone gives the encoder's results."""

import re
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import trainings
from family_specs import TEXT_SPECS
from random_trees import head_shapes, random_leaves

import mtv_jax
from mtv_jax.cli.main import run_command
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerFiles
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models import two_tower
from mtv_jax.models.heads.caption_decoder import CaptionHead
from mtv_jax.models.heads.dpt import DepthHead
from mtv_jax.models.heads.prompter import GroundingHead
from mtv_jax.parallel.mesh import make_mesh

HEADS = {
  "depth": DepthHead(taps=(0, 0, 1, 1), features=8, channels=(8, 8, 8, 8)),
  "caption": CaptionHead(tasks=("caption",), depth=1),
  "grounding": GroundingHead(),
}
# After the page's code: other batches, and the other functions.
CALL = """
import sys
images, tokens = np.load("inputs.npz").values()
results = {}
for name, inputs in dict(image=images, depth=images, text=tokens).items():
  with open(f"{folder}/{name}.stablehlo", "rb") as file:
    function = jax.export.deserialize(bytearray(file.read()))
  outputs = function.call(params, inputs)
  results |= {f"{name}_{k}": v for k, v in outputs.items()}
np.savez("results.npz", photo=features["pooled"], **results)
assert not any(name.startswith("mtv_jax") for name in sys.modules)
"""


def write_model(folder):
  spec = two_tower.ModelSpec.from_config(TEXT_SPECS["siglip"])
  heads = {name: head.resolve(spec) for name, head in HEADS.items()}
  shapes = {head.params_key: head_shapes(head, spec) for head in heads.values()}
  shapes = {**two_tower.abstract_params(spec), "heads": shapes}
  model = ConvertedModel(
    spec,
    random_leaves(shapes),
    Preprocess(size=64).to_dict(),
    TokenizerFiles(None, "lower"),
    prediction_heads=heads,
  )
  return native.write(folder, model)


@pytest.mark.slow
def test_a_process_without_mtv_jax(repo_root, tmp_path, monkeypatch, capsys):
  pytest.importorskip("flatbuffers")
  write_model(tmp_path / "model")
  monkeypatch.chdir(tmp_path)
  run_command("convert", ["to_stablehlo", "model", "OUT"])
  assert "grounding: it reads more than images" in capsys.readouterr().out
  names = {path.stem for path in (tmp_path / "OUT").glob("*.stablehlo")}
  assert names == {"image", "text", "depth", "caption"}

  encoder = mtv_jax.load("OUT", mesh=make_mesh({"data": 1}, jax.devices()[:1]))
  rng = np.random.default_rng(0)
  photos = rng.integers(0, 256, (3, 70, 64, 3), dtype=np.uint8)
  images = np.stack([encoder.preprocess(photo) for photo in photos])
  texts = ["a cat", "two dogs"]
  tokens = np.int32(encoder.tokenizer.encode(texts, encoder.spec.text.length))
  np.savez("inputs.npz", images=images, tokens=tokens)
  PIL.Image.fromarray(photos[0]).save("photo.jpg", quality=100)
  page = (repo_root / "docs" / "conversion.md").read_text()
  (code,) = re.findall(r"## StableHLO.*?```python\n(.*?)```", page, re.DOTALL)
  (tmp_path / "serve.py").write_text(code + CALL)
  subprocess.run(
    [sys.executable, "serve.py"], check=True, env=trainings.cpu_env(1)
  )
  got, want = np.load("results.npz"), encoder.image(photos)
  for name, value in (
    ("image_pooled", want.pooled),
    ("image_patches", want.patches),
    ("depth_depth", encoder.depth(photos)),
    ("text_pooled", encoder.text(texts)),
    ("photo", encoder.image(["photo.jpg"]).pooled),
  ):
    assert np.ptp(value) > 1e-2
    np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
  # A conversion to another format leaves no old functions.
  run_command("convert", ["from_hf", "model", "OUT"])
  assert not [*(tmp_path / "OUT").glob("*.stablehlo")]


def test_a_fixed_batch(tmp_path):
  pytest.importorskip("flatbuffers")
  write_model(tmp_path / "model")
  arguments = ["to_stablehlo", f"{tmp_path}/model", f"{tmp_path}/out"]
  with pytest.raises(SystemExit, match="batch=0"):
    run_command("convert", [*arguments, "--batch=0"])
  run_command("convert", [*arguments, "--batch=2"])
  content = (tmp_path / "out" / "image.stablehlo").read_bytes()
  function = jax.export.deserialize(bytearray(content))
  assert function.in_avals[-1].shape == (2, 64, 64, 3)
  assert function.platforms == ("cpu", "cuda", "tpu")
