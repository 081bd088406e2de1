"""Folders of models, opened by the publishers' libraries without mtv_jax.

As a script, for each line `[folder, class name, file, result]` of JSON on its
input, saves the pixels and the embedding of an image file, or of normalised
pixels (`.npy`), and answers with `result`, or with "failed".
"""

import json
import pathlib
import re
import sys
import traceback

import numpy as np

# `pooler_output` of these is not the CLS token.
_CLS = ("ViTModel", "DeiTModel", "ViTMAEForPreTraining")


def load_model(folder, class_name):
  """transformers opens a folder without missing or unexpected tensors."""
  import transformers

  # AutoModel has no classes with a projection or a task.
  is_auto = not re.search("With|For", class_name)
  kind = getattr(transformers, "AutoModel" if is_auto else class_name)
  model, info = kind.from_pretrained(folder, output_loading_info=True)
  assert type(model).__name__ == class_name
  assert not any(info.values()), info
  return model.eval()


def _open_timm(folder):
  import timm

  model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
  options = timm.data.resolve_model_data_config(model)
  return timm.data.create_transform(**options), model


def _open_open_clip(folder):
  import open_clip

  name = f"local-dir:{folder}"
  model, transform = open_clip.create_model_from_pretrained(name)
  return transform, model.eval().encode_image


def _open_transformers(folder, class_name):
  import transformers

  model = load_model(folder, class_name)
  if class_name == "ViTMAEForPreTraining":
    model.config.mask_ratio = 0.0
    model = model.vit
  path = pathlib.Path(folder, "preprocessor_config.json")
  kind = json.loads(path.read_text())["image_processor_type"]
  has_pillow = hasattr(transformers, f"{kind}Pil")
  processor = transformers.AutoImageProcessor.from_pretrained(
    folder, backend="pil" if has_pillow else "torchvision"
  )

  def read(image):
    return dict(processor(image, return_tensors="pt"))

  card = pathlib.Path(folder, "README.md")
  text = card.read_text() if card.is_file() else ""
  mean = re.search(r"last_hidden_state\[:, (\d+):\]", text)

  def encode(inputs):
    inputs = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
    out = getattr(model, "get_image_features", model)(**inputs)
    if mean:  # Not the class's `pooler_output`.
      return out.last_hidden_state[:, int(mean[1]) :].mean(1)
    if class_name in _CLS:
      return out.last_hidden_state[:, 0]
    names = ("image_embeds", "summary", "pooler_output")
    pooled = [out[name] for name in names if out.get(name) is not None]
    return pooled[0] if pooled else out.last_hidden_state.mean(1)

  return read, encode


def embed(folder, class_name, file):
  """Pixels and embedding of an image file, or of normalised pixels."""
  import PIL.Image
  import torch

  if class_name == "CLIP":
    read, encode = _open_open_clip(folder)
  elif class_name.startswith("vit_"):
    read, encode = _open_timm(folder)
  else:
    read, encode = _open_transformers(folder, class_name)
  if file.endswith(".npy"):
    inputs = torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)
  else:
    inputs = read(PIL.Image.open(file).convert("RGB"))
  if isinstance(inputs, torch.Tensor) and inputs.ndim == 3:
    inputs = inputs[None]  # A transform's.
  with torch.no_grad():
    pooled = encode(inputs).numpy()
  pixels = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
  pixels = pixels.numpy()[0]  # [3, H, W], or [N, F] of native aspect ratio.
  return pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels, pooled


def main():
  sys.modules["mtv_jax"] = None  # An import raises ImportError.
  replies, sys.stdout = sys.stdout, sys.stderr
  for line in sys.stdin:
    *arguments, result = json.loads(line)
    try:
      pixels, pooled = embed(*arguments)
      np.savez(result, pixels=pixels, pooled=pooled)
    except Exception:
      traceback.print_exc()
      result = "failed"
    print(result, file=replies, flush=True)


if __name__ == "__main__":
  main()
