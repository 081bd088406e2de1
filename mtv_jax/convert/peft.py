"""LoRA adapters in PEFT's format, for the model that they were trained on.

`adapter_model.safetensors` and `adapter_config.json` open with
`peft.PeftModel.from_pretrained`; `heads.safetensors` has the run's heads, which
only mtv_jax reads. q, k and v, fused here, become three adapters with equal A.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mtv_jax.config import foreign
from mtv_jax.convert import hf_files, huggingface, native
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.convert.tables import ConversionError, Rule
from mtv_jax.models import lora as lora_lib
from mtv_jax.models.lora import LoraConfig
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import MissingFileError
from mtv_jax.utils.text import list_first

ADAPTERS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Families whose files differ from transformers 5 in the names of layers.
_UNSUPPORTED = ("radio", "tipsv2", "vit", "vit_mae", "deit", "ijepa")
# Prefix of a standalone tower's modules if it is not empty.
_PREFIXES = {"dinov3_vit": "model."}
_RENAMED = {  # In DINOv2.
  "attention.attention.query": "attention.q_proj",
  "attention.attention.key": "attention.k_proj",
  "attention.attention.value": "attention.v_proj",
  "attention.output.dense": "attention.o_proj",
}
_MERGE = "Export the merged model instead: `mtv-jax convert to_hf`."


def write(
  folder: str | os.PathLike,
  model: ConvertedModel,
  *,
  lora: LoraConfig,
  base: pathlib.Path,
  name: str,
  revision: str | None = None,
) -> pathlib.PurePath:
  """Writes the adapters of a run's unmerged model to a new or empty folder.

  `base` is the Hugging Face folder of the model that the run continued; PEFT
  loads it by `name` and `revision`. Raises ConversionError unless the base with
  these adapters is the run's encoder.
  """
  try:
    base = hf_files.require_folder(base)
  except MissingFileError as error:
    raise MissingFileError(
      f"{error} The run continued it, and its adapters need it: move it back."
    ) from None
  config = foreign.read_object(base / "config.json")
  family = huggingface.find_family(base, config)
  if family.name in _UNSUPPORTED:
    raise ConversionError(
      f"{base}: transformers and the weights of {family.class_name} name "
      f"layers differently, so PEFT can't adapt it. {_MERGE}"
    )
  if {*lora.modules} - {"image", "text"}:
    raise ConversionError(
      "Adapters of a language model are not written for PEFT: its encoder is "
      f"unchanged. {_MERGE}"
    )
  leaves = native.numpy_leaves(model.params)
  _check_base(leaves, base)
  prefix = _PREFIXES.get(family.name, "")
  if family.text is not None and config["model_type"] == family.name:
    prefix = family.image_prefix
  tensors: dict[str, np.ndarray] = {}
  modules: dict[str, None] = {}  # Patterns, without the block index.
  for rule in family.param_mapping(model.spec, prefix):
    for module, down, up in _split_rule(rule, leaves):
      modules[re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(module))] = None
      tensors[f"base_model.model.{module}.lora_A.weight"] = down
      tensors[f"base_model.model.{module}.lora_B.weight"] = up
  settings = {
    "peft_type": "LORA",
    "task_type": "FEATURE_EXTRACTION",
    "base_model_name_or_path": name,
    "revision": revision,
    "r": lora.rank,
    "lora_alpha": lora.alpha,
    "target_modules": "|".join(modules),
    "inference_mode": True,
  }
  output = path_lib.as_path(folder)
  with native.replace_conversion(output, (ADAPTERS, CONFIG)) as path:
    hf_files.write_tensors(path / ADAPTERS, tensors)
    (path / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    heads = {n: x for n, x in leaves.items() if n.startswith("heads/")}
    if heads:
      hf_files.write_tensors(path / huggingface.HEADS, heads)
  return output


def _check_base(leaves: Mapping[str, np.ndarray], base: pathlib.Path) -> None:
  """Raises ConversionError if frozen parameters differ from the base's."""
  base_leaves = native.numpy_leaves(huggingface.read(base).params)
  ignored = re.compile(rf"^heads/|^image/mask_token$|{lora_lib.PATTERN}")
  changed = [
    name
    for name, value in leaves.items()
    if not ignored.search(name)
    and not np.array_equal(value, base_leaves.get(name, np.nan))
  ]
  if changed:
    raise ConversionError(
      f"{base} differs from the run in {list_first(changed, 3)}, so with the "
      "adapters it is not the run's encoder (the run trained them too, or "
      f"resampled the positions). {_MERGE}"
    )


def _split_rule(
  rule: Rule, leaves: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
  """Yields adapters of a rule's tensors: (module, A [r, in], B [out, r]).

  Writing a kernel with B in its first r rows gives each tensor its B, whatever
  part of the columns it has.
  """
  layers = [name.rpartition("/")[0] for name in rule.leaves]
  kernels = [f"{layer}/{lora_lib.LEAVES[0]}" in leaves for layer in layers]
  if not any(n.endswith("/kernel") for n in rule.leaves) or not any(kernels):
    return
  error = ConversionError(
    f"PEFT can't adapt {', '.join(rule.tensors)}, which the model stores "
    f"for {', '.join(rule.leaves)}. {_MERGE}"
  )
  if len(rule.leaves) > 1:
    raise error
  stacks = [leaves[f"{layers[0]}/{leaf}"] for leaf in lora_lib.LEAVES]
  for i in range(max(rule.depth, 1)):
    down, up = (x[i] if rule.depth else x for x in stacks)  # [m, r], [r, n]
    padded = np.zeros((len(down), up.shape[1]), np.float32)
    padded[: len(up)] = up
    file_arrays = rule.write(padded), rule.write(down @ up)
    for name, part, product in zip(rule.tensors, *file_arrays, strict=True):
      part = part[:, : len(up)] if part.ndim == 2 else part
      if part.ndim != 2 or not np.allclose(part @ down.T, product, atol=1e-5):
        raise error
      module = name.replace("{i}", str(i)).removesuffix(".weight")
      for old, new in _RENAMED.items():
        module = module.replace(old, new)
      yield module, np.ascontiguousarray(down.T), np.ascontiguousarray(part)
