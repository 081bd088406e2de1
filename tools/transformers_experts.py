"""Reference experts in `transformers`, with random weights.

Used by `mtv-jax bench experts --against=transformers` and by parity tests.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from mtv_jax.data import tokenizers
from mtv_jax.experts import owlv2
from mtv_jax.perf.bench import experts

VERSIONS = {
  "torch": torch.__version__,
  "transformers": transformers.__version__,
}


def write_depth_anything(variant: str, folder: pathlib.Path) -> Any:
  """Writes a Depth Anything V2 folder; returns the model."""
  config = experts.DepthAnything.make_config(variant)
  config = transformers.DepthAnythingConfig(**config)
  model = transformers.DepthAnythingForDepthEstimation(config).eval()
  randomise(model, torch.Generator().manual_seed(0))
  model.save_pretrained(folder)
  return model


@torch.no_grad()
def randomise(model: Any, generator: torch.Generator) -> None:
  """Draws random weights of Depth Anything that give positive, varied maps."""
  for name, parameter in model.named_parameters():
    scale = 0.2
    if "position_embeddings" in name or "cls_token" in name:
      scale = 1.0
    elif parameter.dim() > 1:
      scale = parameter[0].numel() ** -0.5
    parameter.normal_(0.0, scale, generator=generator)
  # The last layer's input is a ReLU's output, so the map is positive.
  model.head.conv3.weight.abs_()
  model.head.conv3.bias.fill_(0.1)


def run_depth_anything(model: Any, batch_size: int) -> Callable[[], Any]:
  """A function that computes the depth maps of one batch."""
  pixels = _pixels(batch_size, experts.SIZE)
  return lambda: model(pixel_values=pixels).predicted_depth


def write_owlv2(variant: str, folder: pathlib.Path) -> Any:
  """Writes an OWLv2 folder; returns the model."""
  torch.manual_seed(0)
  config = transformers.Owlv2Config(**experts.OWLV2_CONFIGS[variant])
  model = transformers.Owlv2ForObjectDetection(config).eval()
  # With the default initialisation, each box is empty or the whole image.
  with torch.no_grad():
    for head in (model.box_head, model.objectness_head, model.class_head):
      for parameter in head.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
  model.save_pretrained(folder)
  tokenizer = tokenizers.build_tokenizer("bytes")
  tokenizers.export_files(tokenizer, folder, length=16)
  return model


def run_owlv2(model: Any, batch_size: int) -> Callable[[], Any]:
  """A function that computes scores, including the text tower (1 % of time)."""
  pixels = _pixels(batch_size, model.config.vision_config.image_size)
  tokenizer = tokenizers.build_tokenizer("bytes")
  tokens = tokenizer.encode(experts.PHRASES, 16)
  tokens = torch.from_numpy(np.tile(tokens, (batch_size, 1))).long()

  def run() -> torch.Tensor:
    logits = model(input_ids=tokens, pixel_values=pixels).logits
    scores = torch.sigmoid(logits.max(-1).values)
    count = min(owlv2.CANDIDATES, scores.shape[1])
    return scores.topk(count).values

  return run


def _pixels(rows: int, size: int) -> torch.Tensor:
  """The benchmark's pixels `[rows, 3, size, size]`."""
  pixels = torch.from_numpy(experts.make_random_pixels(rows, size))
  return pixels.permute(0, 3, 1, 2).contiguous()


WRITE = {"depth": write_depth_anything, "boxes": write_owlv2}
RUN = {"depth": run_depth_anything, "boxes": run_owlv2}
