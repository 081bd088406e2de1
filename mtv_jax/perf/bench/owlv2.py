"""OWLv2 for the expert benchmark, see `experts`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtv_jax.experts.labelling.phrases import FixedPhrases
from mtv_jax.experts.owlv2 import expert as expert_lib
from mtv_jax.experts.owlv2 import weights
from mtv_jax.experts.owlv2.model import Owlv2
from mtv_jax.perf.bench import experts


def _tower(width: int, depth: int, heads: int, **options: int) -> dict:
  return dict(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    **options,
  )


# Differences from the default config, OWLv2 B/16 at 768 pixels.
CONFIGS: Mapping[str, dict[str, Any]] = {
  "tiny": dict(
    projection_dim=64,
    text_config=_tower(64, 2, 4),
    vision_config=_tower(64, 2, 4, image_size=96),
  ),
  "B": dict(vision_config=dict(image_size=960)),
  "L": dict(
    projection_dim=768,
    text_config=_tower(768, 12, 12),
    vision_config=_tower(1024, 24, 16, image_size=1008, patch_size=14),
  ),
}
PHRASES = ("a dog", "person", "red car", "tree", "traffic light", "boat")
# Queries per image in `program`: about the n-grams of one caption.
_QUERIES = 64


def ours(variant: str, folder: pathlib.Path, batch_size: int) -> experts.RunFn:
  """A function that runs one batch; phrases are encoded once."""
  options = dict(phrases=FixedPhrases(PHRASES), batch_size=batch_size)
  expert = expert_lib.load_expert(folder, **options)
  size = weights.read_spec(CONFIGS[variant]).image.image_size
  arrays = {"pixels": experts.random_pixels(expert.rows, size)}
  return lambda: expert.run(arrays)["scores"]


def program(
  variant: str, batch_size: int, mesh: Mesh, dtype: str
) -> experts.ExpertProgram:
  """The per-device program: image tower and scores."""
  spec = weights.read_spec(CONFIGS[variant])
  model = Owlv2(spec, dtype=jnp.dtype(dtype), scan=False)
  programs = expert_lib.Programs(model, dtype)
  batch, size = batch_size * mesh.size, spec.image.image_size
  shape = jax.ShapeDtypeStruct

  def function(params: Any, rows: Any) -> Any:
    patches = programs.detect(params["model"], rows)
    rows = {"patches": patches, "slots": rows["slots"]}
    return programs.score(params["consts"], rows)

  consts = {
    "table": shape((16_384, spec.text.projection), np.float32),
    "threshold": shape((), np.float32),
  }
  params = {"model": weights.abstract_params(spec), "consts": consts}
  rows = {
    "pixels": shape((batch, size, size, 3), jnp.dtype(dtype)),
    "slots": shape((batch, _QUERIES), np.int32),
  }
  return experts.ExpertProgram(function, params, rows)
