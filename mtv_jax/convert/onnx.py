"""ONNX export of the image tower and a depth head, through PyTorch.

`write` exports a Hugging Face folder, opens it with transformers, and adds
`model.onnx` with PyTorch's exporter: `pixel_values` `[B, 3, H, W]` to `pooled`
`[B, E]`, `patches` `[B, N, D]` and, with a depth head, `depth` `[B, h, w]`.
"""

import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

from mtv_jax.convert import depth_anything, huggingface, native, tensors
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.heads.dpt import DepthHead
from mtv_jax.utils.errors import import_extra

log = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # Relative to the largest value.
_LARGEST_FILE = 1 << 30  # Bytes; Protobuf's limit is 2 GiB.


def write(
  folder: str | os.PathLike,
  model: ConvertedModel,
  *,
  batch: int | None = None,
) -> pathlib.PurePath:
  """Exports a folder as `huggingface.write` does, with `model.onnx`.

  `batch` fixes the batch size; None: any. Compares onnxruntime with PyTorch.
  Raises ConversionError for a model that transformers or ONNX can't express,
  ImportError if torch, transformers, onnxscript or onnxruntime is missing.
  """
  if model.preprocess.get("resize") == "native":
    raise ConversionError(
      "images of native aspect ratio have no fixed shape in ONNX; expected a "
      "model of square images. `mtv-jax convert to_stablehlo` squashes them."
    )
  if model.spec.text is None and model.spec.image.pre_norm:
    raise ConversionError(
      "ONNX export of a CLIP image tower without text or a Perception Encoder "
      "is not supported; `mtv-jax convert to_stablehlo` exports it."
    )
  for module in ("torch", "transformers", "onnxscript", "onnxruntime"):
    import_extra(module, "onnx,reference")
  heads = model.prediction_heads
  others = [name for name in heads if not isinstance(heads[name], DepthHead)]
  if others:
    log.warning("ONNX leaves out the heads %s.", ", ".join(sorted(others)))
  add_files = functools.partial(_export_onnx, model=model, batch=batch)
  return huggingface.write(folder, model, with_heads=False, add_files=add_files)


def _export_onnx(
  folder: pathlib.Path, *, model: ConvertedModel, batch: int | None
) -> None:
  import torch

  file, size = folder / native.ONNX[0], model.preprocess["size"]
  size += model.preprocess.get("drop", 0)
  module, names = _build_module(folder, model)
  example = torch.zeros(batch or 2, 3, size, size)
  dynamic_shapes = None if batch else ({0: torch.export.Dim("batch")},)
  parameters = sum(x.numel() for x in module.parameters())
  with torch.no_grad():
    torch.onnx.export(
      module,
      (example,),
      file,
      input_names=["pixel_values"],
      output_names=names,
      dynamic_shapes=dynamic_shapes,
      dynamo=True,
      external_data=4 * parameters > _LARGEST_FILE,
      verbose=False,
    )
    for count in [batch] if batch else [1, 3]:
      shape = (count, *example.shape[1:])
      generator = torch.Generator().manual_seed(count)
      _check_outputs(file, module, torch.randn(shape, generator=generator))


def _check_outputs(file: pathlib.Path, module: Any, pixels: Any) -> None:
  """Raises ConversionError unless onnxruntime reproduces the outputs."""
  import onnxruntime

  providers = ["CPUExecutionProvider"]
  session = onnxruntime.InferenceSession(file, providers=providers)
  outputs = session.run(None, {"pixel_values": pixels.numpy()})
  for node, got, expected in zip(
    session.get_outputs(), outputs, module(pixels), strict=True
  ):
    expected = expected.numpy()
    limit = _TOLERANCE * max(1.0, float(abs(expected).max()))
    if got.shape != expected.shape or not abs(got - expected).max() <= limit:
      raise ConversionError(
        f"onnxruntime's {node.name!r} of {len(pixels)} images differs from "
        f"PyTorch's by more than {limit:.1e}: try another release of torch or "
        "onnxscript."
      )


def _build_module(
  folder: pathlib.Path, model: ConvertedModel
) -> tuple[Any, list[str]]:
  """Builds a torch module of `pixel_values`; also returns its output names."""
  import torch
  import transformers

  tower = transformers.AutoModel.from_pretrained(folder).eval()
  image, side = model.spec.image, model.preprocess["size"]
  grid = image.grid_of(side, side)
  head = model.prediction_heads.get("depth")
  heads = model.params.get("heads", {})
  has_depth = isinstance(head, DepthHead) and head.params_key in heads
  depth = _build_depth(model, head, grid) if has_depth else None
  encode = tower if model.spec.text is None else tower.get_image_features

  class Module(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.tower, self.depth = tower, depth

    def forward(self, pixel_values):
      out = encode(pixel_values=pixel_values, output_hidden_states=has_depth)
      patches = out.last_hidden_state[:, image.prefix :]
      if image.pre_norm:  # CLIPModel and MetaClip2Model normalize only CLS.
        patches = tower.vision_model.post_layernorm(patches)
      pooled = getattr(out, "pooler_output", None)
      if image.pool == "mean":
        pooled = patches.mean(dim=1)
      elif pooled is None:
        pooled = out.summary  # RADIO.
      if not has_depth:
        return pooled, patches
      # The first hidden state is the embedding.
      stages = [out.hidden_states[i + 1][:, image.prefix :] for i in head.taps]
      return pooled, patches, depth(stages)

  names = ["pooled", "patches", *(["depth"] if has_depth else [])]
  return Module().eval(), names


def _build_depth(
  model: ConvertedModel, head: DepthHead, grid: tuple[int, int]
) -> Any:
  """Rebuilds `dpt.DPT` for patch tokens from transformers' Depth Anything."""
  import torch
  from torch.nn.functional import interpolate

  norms, neck, last = _build_parts(model, head)

  class Depth(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.norms, self.neck, self.last = norms, neck, last

    def forward(self, stages):
      maps = []
      parts = zip(norms, neck.reassemble_stage.layers, neck.convs, strict=True)
      for x, (norm, layer, conv) in zip(stages, parts, strict=True):
        maps.append(conv(layer(norm(x).transpose(1, 2).unflatten(2, grid))))
      sizes = [x.shape[2:] for x in maps[:-1]]
      sizes.insert(0, [head.upsample * side for side in sizes[0]])
      x = ()
      for i in reversed(range(len(maps))):
        fuse = neck.fusion_stage.layers[-1 - i]  # The first is the deepest.
        x = (fuse(*x, maps[i], size=sizes[i]),)
      options = dict(mode="bilinear", align_corners=True)
      x = interpolate(last.conv1(*x), head.map_size(grid), **options)
      x = last.conv3(torch.relu(last.conv2(x)))[:, 0]
      return torch.relu(x) if head.activation == "relu" else x

  return Depth()


def _build_parts(model: ConvertedModel, head: DepthHead) -> tuple[Any, ...]:
  """Builds the stages' norms, and the neck and head of Depth Anything."""
  import torch
  import transformers

  width = model.spec.image.width
  config = transformers.DepthAnythingConfig(
    reassemble_hidden_size=width,
    neck_hidden_sizes=list(head.channels),
    fusion_hidden_size=head.features,
    head_hidden_size=head.head_features,
  )
  config.backbone_config.num_hidden_layers = 1  # Not used.
  net = transformers.DepthAnythingForDepthEstimation(config)
  dpt_module = dataclasses.replace(head.module(), tap_norm="none")
  spec = depth_anything.DepthSpec(model.spec.image, head.taps, dpt_module)
  leaves = native.numpy_leaves(
    {"depth": model.params["heads"][head.params_key]}
  )
  weights = tensors.save(depth_anything.head_mapping(spec), leaves)
  weights = {name: torch.tensor(value) for name, value in weights.items()}
  net.load_state_dict(weights, strict=False)
  norms = torch.nn.ModuleList(torch.nn.Identity() for _ in head.taps)
  for i in range(len(norms)) if head.tap_norm == "layer" else ():
    norms[i] = torch.nn.LayerNorm(width, depth_anything.NORM_EPS)
    names = {"weight": "scale", "bias": "bias"}
    norms[i].load_state_dict(
      {
        k: torch.tensor(leaves[f"depth/norm{i + 1}/{n}"])
        for k, n in names.items()
      }
    )
  return norms, net.neck, net.head
