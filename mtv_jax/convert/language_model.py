"""Reads transformers language models in the layouts of Llama and Qwen2."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtv_jax.config import foreign, options
from mtv_jax.convert import hf_files, tables, tensors
from mtv_jax.convert.tables import ConversionError
from mtv_jax.models.language_model import LanguageModel, LanguageModelSpec
from mtv_jax.utils.errors import did_you_mean

# Whether queries, keys and values have a bias, by model_type.
_QKV_BIAS = {"llama": False, "qwen2": True}
_BLOCK = {
  "norm1": "input_layernorm",
  "attention/q": "self_attn.q_proj",
  "attention/kv": ("self_attn.k_proj", "self_attn.v_proj"),
  "attention/out": "self_attn.o_proj",
  "norm2": "post_attention_layernorm",
  "mlp/gate": "mlp.gate_proj",
  "mlp/fc1": "mlp.up_proj",
  "mlp/fc2": "mlp.down_proj",
}
_NAMES = {
  "token_embedding": "model.embed_tokens.weight",
  **tables.nest("blocks/", "model.layers.{i}.", _BLOCK),
  "norm": "model.norm",
  "projection": "lm_head",
}
# Buffers of old files, and the copy of tied embeddings.
_IGNORED = r"rotary_emb\.inv_freq$"
_TIED = r"^lm_head\.weight$"
# transformers' defaults of the keys that are read.
_DEFAULTS = {
  "hidden_act": "silu",
  "attention_bias": False,
  "mlp_bias": False,
  "use_sliding_window": False,
  "tie_word_embeddings": False,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
}
_TYPES = {
  "attention_bias": bool,
  "head_dim": int,
  "max_position_embeddings": int,  # Unused; may exceed `Length`'s limit.
  "num_key_value_heads": int,
  "rope_parameters": dict,
  "rope_scaling": dict,
  "tie_word_embeddings": bool,
  "use_sliding_window": bool,
}
# Keys of `rope_scaling` with type "llama3", in the order of the spec's field.
_SCALING = (
  "factor", "low_freq_factor", "high_freq_factor",
  "original_max_position_embeddings",
)  # fmt: skip


class LoadedLanguageModel(NamedTuple):
  """A language model; `params` are NumPy arrays, {} if they were not read."""

  spec: LanguageModelSpec
  params: dict[str, Any]


def read(
  folder: str | os.PathLike, *, with_params: bool = True
) -> LoadedLanguageModel:
  """Reads a `LlamaForCausalLM` or a `Qwen2ForCausalLM`, possibly in shards.

  Raises ConversionError for other models or unsupported options.
  """
  path = hf_files.require_folder(folder)
  config = foreign.read_object(path / "config.json")
  with foreign.errors_of(path / "config.json"):
    spec = read_spec(config)
  if not with_params:
    return LoadedLanguageModel(spec, {})
  shapes = jax.eval_shape(
    functools.partial(LanguageModel(spec).init, jax.random.key(0)),
    jnp.zeros((1, 1, spec.width)),
  )["params"]
  rules = tables.leaf_rules(shapes, _NAMES, heads=spec.kv_heads)
  ignored = f"{_IGNORED}|{_TIED}" if spec.tied else _IGNORED
  with hf_files.open_weights(path) as store:
    return LoadedLanguageModel(spec, tensors.load(rules, store, ignore=ignored))


def read_spec(config: Mapping[str, Any]) -> LanguageModelSpec:
  """Reads the architecture from a `config.json`."""
  model_type = str(config.get("model_type"))
  if model_type not in _QKV_BIAS:
    raise ConversionError(
      f"model_type {model_type!r} is not a supported language model. "
      f"{did_you_mean(model_type, _QKV_BIAS)}"
    )
  fields = hf_files.with_defaults(config, _DEFAULTS, own=_TYPES)
  hf_files.require(
    ("hidden_act", fields["hidden_act"], "silu"),
    *((n, fields[n], False) for n in ("attention_bias", "mlp_bias")),
    ("use_sliding_window", fields["use_sliding_window"], False),
  )
  try:
    heads = fields["num_attention_heads"]
    theta, scaling = _read_rope(fields)
    spec = LanguageModelSpec(
      vocab_size=fields["vocab_size"],
      width=fields["hidden_size"],
      depth=fields["num_hidden_layers"],
      heads=heads,
      kv_heads=fields.get("num_key_value_heads", heads),
      head_dim=fields.get("head_dim"),
      mlp_dim=fields["intermediate_size"],
      qkv_bias=_QKV_BIAS[model_type],
      tied=fields["tie_word_embeddings"],
      norm_eps=fields["rms_norm_eps"],
      rope_theta=theta,
      rope_scaling=scaling,
    )
  except KeyError as error:
    raise ConversionError(f"the key {error} is missing.") from None
  spec.check()
  return spec


def _read_rope(
  fields: Mapping[str, Any],
) -> tuple[float, tuple[float, ...] | None]:
  """Reads the rotary base, and Llama 3's scaling of the frequencies."""
  # Since transformers 5, `rope_parameters` holds both.
  old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
  rope = new or old or {}
  if (old and new and old != new) or any(
    isinstance(value, Mapping) for value in rope.values()
  ):
    raise ConversionError(
      f"rotations per layer, or two scalings, are not supported: {rope}."
    )
  read = functools.partial(foreign.read_field, rope, where="rope_scaling.")
  theta = rope.get("rope_theta", fields["rope_theta"])
  kind = rope.get("rope_type", rope.get("type", "default"))
  hf_files.require(
    ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
  )
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise ConversionError(
      f"the rope scaling {kind!r} is not supported; expected 'llama3' or none."
    )
  factor, low, high, length = (read(k, options.PositiveFloat) for k in _SCALING)
  if low >= high:
    raise ConversionError(
      f"rope_scaling.low_freq_factor is {low:g}; expected less than the "
      f"high_freq_factor {high:g}."
    )
  return theta, (factor, low, high, length)
