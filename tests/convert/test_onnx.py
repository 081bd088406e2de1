"""ONNX exports: onnxruntime gives the encoder's features."""

import re

import jax
import numpy as np
import PIL.Image
import pytest
import tower_parity as parity
from family_specs import EXPORTED, TEXT_SPECS
from random_trees import fill, head_shapes

import mtv_jax
from mtv_jax.cli.main import run_command
from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder.preprocess import Preprocess
from mtv_jax.models.heads.dpt import DepthHead
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.parallel.mesh import make_mesh

CLIP = TEXT_SPECS["clip"]
DEPTH = dict(taps=(0, 0, 1, 1), features=8, channels=(8, 12, 16, 16))
# Depth Anything's form, and the one that runs train.
RELEASED = DepthHead(**DEPTH, scale=16, upsample=2, activation="relu")
TRAINED = DepthHead(**DEPTH, tap_norm="none", head_features=4)


def write_model(folder, fields, head=None, **preprocess):
  spec = ModelSpec.from_config(fields)
  params, heads = parity.random_params(spec), {}
  if spec.text is not None:
    heads["contrastive"] = {"logit_scale": np.float32(1)}
  if head is not None:
    heads["depth"] = fill(head_shapes(head, spec))
  model = ConvertedModel(
    spec,
    {**params, "heads": heads},
    Preprocess(**{"size": 64, **preprocess}).to_dict(),
    prediction_heads={"depth": head} if head else {},
  )
  return native.write(folder, model)


@pytest.mark.reference
@pytest.mark.slow
# Deprecations inside torch, transformers and onnxscript.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
  ("fields", "head", "preprocess", "batch"),
  [
    (EXPORTED["dinov2"], RELEASED, {"size": 48}, None),
    (EXPORTED["siglip_vision_model"], TRAINED, {}, 2),
    (CLIP, None, {}, None),
    *(
      pytest.param(fields, None, {}, None, marks=pytest.mark.long)
      for fields in (
        {**CLIP, "text": {**CLIP["text"], "pool": "first_eos"}},
        EXPORTED["radio"],
        {**EXPORTED["siglip_vision_model"], "pool": "mean"},
      )
    ),
  ],
  ids=["dinov2", "siglip", "clip", "metaclip2", "radio", "mean"],
)
def test_onnxruntime_gives_the_features(
  fields, head, preprocess, batch, repo_root, tmp_path, monkeypatch
):
  """For batches of any size, or one; runs the code of docs/conversion.md."""
  for name in ("torch", "transformers", "onnxscript"):
    pytest.importorskip(name)
  onnxruntime = pytest.importorskip("onnxruntime")
  write_model(tmp_path / "model", fields, head, **preprocess)
  monkeypatch.chdir(tmp_path)
  fixed = [f"--batch={batch}"] if batch else []
  run_command("convert", ["to_onnx", "model", "OUT", *fixed])
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  encoder = mtv_jax.load("OUT", mesh=mesh)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5, 70, 64, 3), dtype=np.uint8)
  session = onnxruntime.InferenceSession("OUT/model.onnx")
  for count in [batch] if batch else [1, 2, 5]:
    pixels = np.stack([encoder.preprocess(image) for image in images[:count]])
    inputs = {"pixel_values": pixels.transpose(0, 3, 1, 2)}
    pooled, patches, *depth = session.run(None, inputs)
    want = encoder.image(images[:count])
    pairs = {"pooled": (want.pooled, pooled)}
    pairs["patches"] = (want.patches.reshape(patches.shape), patches)
    if head is not None:
      pairs["depth"] = (encoder.depth(images[:count]), *depth)
    parity.largest_difference(pairs)
  if batch is None:
    PIL.Image.fromarray(images[0]).save("photo.jpg")
    page = (repo_root / "docs" / "conversion.md").read_text()
    (code,) = re.findall(r"## ONNX.*?```python\n(.*?)```", page, re.DOTALL)
    exec(code, scope := {})
    assert scope["features"]["pooled"].shape == (1, pooled.shape[1])


def test_images_of_native_aspect_ratio_have_no_onnx(tmp_path):
  naflex = dict(resize="native", patch_size=16, max_patches=16)
  fields = EXPORTED["siglip2_vision_model"]
  write_model(tmp_path / "model", fields, **naflex)
  arguments = ["to_onnx", f"{tmp_path}/model", f"{tmp_path}/out"]
  with pytest.raises(SystemExit, match="native aspect ratio.*to_stablehlo"):
    run_command("convert", arguments)
