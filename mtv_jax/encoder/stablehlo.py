"""StableHLO export: a model's functions, for processes with only JAX.

`write` adds `NAME.stablehlo` to a native folder, as `jax.export` serializes it:

  image  `params`, `[B, S, S, 3]` to `pooled`, `patches` and `prefix`
  text   `params`, token ids `[B, T]` to `pooled`
  HEAD   each head that reads only images, such as `depth`; inputs as `image`

`params` are the arrays of `params.safetensors` by name, images float32 and
normalised. Programs run on CPUs, GPUs and TPUs.
"""

from __future__ import annotations

import logging
import os
import pathlib
from typing import Any

import jax

from mtv_jax.convert import native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.encoder import apply_fns
from mtv_jax.encoder.features import OUTPUTS
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.utils.errors import import_extra
from mtv_jax.utils.tree import unflatten_names

log = logging.getLogger(__name__)

_PLATFORMS = ("cpu", "cuda", "tpu")


def write(
  folder: str | os.PathLike,
  model: ConvertedModel,
  *,
  batch: int | None = None,
) -> pathlib.PurePath:
  """Writes a native folder with the model's functions.

  `batch` fixes the batch size; None: any. Raises ImportError without the extra
  `stablehlo`.
  """
  import_extra("flatbuffers", "stablehlo")

  def add_functions(path: pathlib.Path) -> None:
    params = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for name, leaf in native.numpy_leaves(model.params).items()
    }
    rows = batch or jax.export.symbolic_shape("batch")[0]
    for name, (function, shape, dtype) in _build_functions(model).items():
      inputs = jax.ShapeDtypeStruct((rows, *shape), dtype)
      run = jax.jit(lambda p, x, f=function: f(unflatten_names(p), x))
      export = jax.export.export(run, platforms=_PLATFORMS)
      content = export(params, inputs).serialize()
      (path / f"{name}{native.STABLEHLO}").write_bytes(content)

  return native.write(folder, model, add_files=add_functions)


def _build_functions(model: ConvertedModel) -> dict[str, tuple[Any, ...]]:
  """Returns (function of parameters and inputs, row shape, dtype) by name."""
  spec, size = model.spec, model.preprocess["size"]
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  image = apply_fns.image_function(spec, "float32", (), OUTPUTS, mesh)

  def bind_tower(function, tower):
    # Unwrapped, to omit compiler options for this machine.
    return lambda params, x: function.__wrapped__(params[tower], x)

  images = (size, size, 3), "float32"
  functions = {"image": (bind_tower(image, "image"), *images)}
  if spec.text is not None:
    text = apply_fns.text_function(spec, "float32", mesh)
    functions["text"] = bind_tower(text, "text"), (spec.text.length,), "int32"
  for name, head in model.prediction_heads.items():
    if head.params_key not in model.params.get("heads", {}):
      continue
    if head.inputs:
      log.warning("Leaving out the head %s: it reads more than images.", name)
      continue
    run = apply_fns.head_function(spec, head, "float32", mesh).__wrapped__
    functions[name] = lambda p, x, run=run: run(p, {"images": x}), *images
  return functions
