"""OWLv2 as `benchmarks/experts.py` times it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtv_jax.data import tokenizers
from mtv_jax.experts import local_mesh
from mtv_jax.experts.labelling import detections
from mtv_jax.experts.labelling.phrases import Vocabulary
from mtv_jax.experts.owlv2 import expert as expert_lib
from mtv_jax.experts.owlv2 import weights as owlv2_weights
from mtv_jax.experts.owlv2.model import Owlv2
from mtv_jax.experts.owlv2.weights import Owlv2Files
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.perf.bench.experts import Program, Side

_SMALL = dict(
  hidden_size=64,
  intermediate_size=128,
  num_hidden_layers=2,
  num_attention_heads=4,
)
# What sets a config apart from that of OWLv2 B/16 at 768 pixels.
_CONFIGS: Mapping[str, dict[str, Any]] = {
  "tiny": dict(
    projection_dim=64,
    text_config=dict(_SMALL),
    vision_config=dict(_SMALL, image_size=96),
  ),
  "B": dict(vision_config=dict(image_size=960)),
  "L": dict(
    projection_dim=768,
    text_config=dict(
      hidden_size=768, intermediate_size=3072, num_attention_heads=12
    ),
    vision_config=dict(
      image_size=1008,
      patch_size=14,
      hidden_size=1024,
      intermediate_size=4096,
      num_hidden_layers=24,
      num_attention_heads=16,
    ),
  ),
}
VARIANTS = tuple(_CONFIGS)
PHRASES = ("a dog", "person", "red car", "tree", "traffic light", "boat")
# Queries of an image in the program: as many as a caption has n-grams.
_QUERIES = 64


def make_spec(variant: str) -> ModelSpec:
  """The towers of a released model, or of a tiny one."""
  return owlv2_weights.read_spec(_CONFIGS[variant])


def write(variant: str, folder: pathlib.Path) -> Any:
  """A folder by `transformers`, with random weights; its model."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.Owlv2Config(**_CONFIGS[variant])
  model = transformers.Owlv2ForObjectDetection(config).eval()
  randomise_heads(model)
  model.save_pretrained(folder)
  tokenizers.export_files(_tokenizer(), folder, length=16)
  return model


def randomise_heads(model: Any) -> None:
  """Draws heads anew: theirs make each box the image or nothing."""
  import torch

  with torch.no_grad():
    for head in (model.box_head, model.objectness_head, model.class_head):
      for parameter in head.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)


def ours(variant: str, folder: pathlib.Path | None, batch_size: int) -> Side:
  """One batch through our expert, on this host's devices.

  Its phrases are encoded once, as those of a closed vocabulary are.
  """
  options = dict(
    phrases=Vocabulary(PHRASES), mesh=local_mesh.local_mesh(), dtype="float32"
  )
  if folder is not None:
    expert = expert_lib.load_expert(folder, batch_size=batch_size, **options)
  else:
    expert = _random(variant, batch_size, options)
  arrays = {"pixels": _images(variant, expert.rows)}

  def run() -> np.ndarray:
    return np.asarray(expert.run(arrays)["scores"])

  return run


def theirs(model: Any, batch_size: int) -> Side:
  """The same batch through the model of `transformers`.

  With its text tower, which is a hundredth of B/16's work.
  """
  import torch

  side = model.config.vision_config.image_size
  pixels = np.ascontiguousarray(_pixels(side, batch_size).transpose(0, 3, 1, 2))
  pixels = torch.from_numpy(pixels)
  tokens = np.tile(_tokenizer().encode(PHRASES, 16), (batch_size, 1))
  tokens = torch.from_numpy(tokens).long()

  def run() -> np.ndarray:
    with torch.inference_mode():
      logits = model(input_ids=tokens, pixel_values=pixels).logits
      scores = torch.sigmoid(logits.max(-1).values)
      count = min(expert_lib.CANDIDATES, scores.shape[1])
      return scores.topk(count).values.numpy()

  return run


def program(variant: str, batch_size: int, mesh: Mesh) -> Program:
  """What runs on one device of an image, in bfloat16, queries given.

  Its layers are unrolled to be counted. Blocks of attention are a loop all the
  same, of which XLA counts one turn.
  """
  spec = make_spec(variant)
  programs = expert_lib.Programs(
    Owlv2(spec, dtype=jnp.bfloat16, scan=False), "bfloat16"
  )
  rows, side = batch_size * mesh.size, spec.image.image_size

  def function(params: Any, rows: Any) -> Any:
    patches = programs.detect(params["model"], rows)
    return programs.score(
      params["consts"], {"patches": patches, "slots": rows["slots"]}
    )

  width = spec.text.projection
  consts = {
    "table": jax.ShapeDtypeStruct((16_384, width), np.float32),
    "threshold": jax.ShapeDtypeStruct((), np.float32),
  }
  return Program(
    function,
    {"model": abstract_params(spec), "consts": consts},
    {
      "pixels": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.bfloat16),
      "slots": jax.ShapeDtypeStruct((rows, _QUERIES), np.int32),
    },
  )


def abstract_params(spec: ModelSpec) -> Any:
  """Shapes of the parameters, float32."""
  side = spec.image.patch_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  tokens = jax.ShapeDtypeStruct((1, 1, spec.text.length), np.int32)
  init = Owlv2(spec).init
  return jax.eval_shape(init, jax.random.key(0), images, tokens)["params"]


def _tokenizer() -> tokenizers.Tokenizer:
  return tokenizers.build_tokenizer("bytes")


def _images(variant: str, rows: int) -> np.ndarray:
  return _pixels(make_spec(variant).image.image_size, rows)


def _pixels(side: int, rows: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.normal(size=(rows, side, side, 3)).astype(np.float32)


def _random(
  variant: str, batch_size: int, options: Mapping[str, Any]
) -> expert_lib.Owlv2Boxes:
  """The expert with random weights of its own."""
  spec = make_spec(variant)
  rng = np.random.default_rng(0)

  def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    fan_in = max(1, int(np.prod(leaf.shape[:-1])))
    noise = rng.standard_normal(leaf.shape, np.float32)
    return noise * np.float32(fan_in**-0.5)

  files = Owlv2Files(
    spec=spec,
    params=jax.tree.map(draw, abstract_params(spec)),
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    tokenizer=_tokenizer(),
    tokenizer_hash="",
  )
  return expert_lib.Owlv2Boxes(
    files,
    rows=batch_size * options["mesh"].size,
    size=spec.image.image_size,
    prompts=("{}",),
    options=detections.check_options(
      threshold=0.1, nms=0.5, max_boxes=30, min_side=0.015, max_area=0.95
    ),
    source={},
    **options,
  )
