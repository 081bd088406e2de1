"""Language models against transformers: logits, and greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtv_jax.convert import language_model as convert
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder.loading import read_language_model
from mtv_jax.models.language_model import LanguageModel, LanguageModelSpec
from mtv_jax.parallel.mesh import make_mesh
from mtv_jax.parallel.rules import tree_shardings

SIZES = dict(
  vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
  num_key_value_heads=2, intermediate_size=80, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = dict(
  rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
  original_max_position_embeddings=16, rope_theta=500_000.0,
)  # fmt: skip
LAYOUTS = {
  "smollm2": dict(model_type="llama", tie_word_embeddings=True),
  "qwen2.5": dict(model_type="qwen2", tie_word_embeddings=False),
  "llama3.2": dict(
    model_type="llama", tie_word_embeddings=True, head_dim=16,
    max_position_embeddings=131_072, rope_parameters=LLAMA3,
  ),
}  # fmt: skip
STOP, COUNT = 0, 8


@jax.jit(static_argnums=0)
def logits(model, params, tokens):
  def run(model):
    out = model.logits(model(model.embed(tokens))[:, None])
    return out.chunk(out.kernel, out.bias)[:, 0]

  return model.apply({"params": params}, method=run)


@jax.jit(static_argnums=0)
def generate(model, params, tokens, length):
  def run(model):
    return model.generate(
      model.embed(tokens), length, max_tokens=COUNT, stop=STOP
    )

  return model.apply({"params": params}, method=run)


@pytest.mark.reference
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers(layout, tmp_path):
  torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
  options = dict(LAYOUTS[layout])
  config = transformers.AutoConfig.for_model(**(SIZES | options))
  torch.manual_seed(0)
  theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():  # Biases and norms differ from their initial values.
    for parameter in theirs.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  theirs.save_pretrained(tmp_path, max_shard_size="60KB")
  assert len([*tmp_path.glob("model-*.safetensors")]) > 1

  spec, params = convert.read(tmp_path)
  source = read_language_model(tmp_path, with_params=False)
  assert LanguageModelSpec(**source.options) == spec
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, SIZES["vocab_size"], (3, 20))
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  model = LanguageModel(spec)
  np.testing.assert_allclose(logits(model, params, tokens), want, atol=1e-4)

  # Greedy decoding of each prompt alone, without padding.
  length = np.array([20, 11, 1])
  with torch.no_grad():
    want = [
      theirs.generate(
        torch.tensor(row[None, :n]), max_new_tokens=COUNT, do_sample=False,
        pad_token_id=STOP, eos_token_id=STOP,
      )[0, n:].tolist()
      for row, n in zip(tokens, length, strict=True)
    ]  # fmt: skip
  want = [row + [STOP] * (COUNT - len(row)) for row in want]
  got = generate(model, params, tokens, length)
  assert got.tolist() == want

  if layout != "qwen2.5":  # With all biases and projections.
    return
  mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
  sharded = jax.device_put(params, tree_shardings(params, mesh))
  got = logits(
    LanguageModel(spec, mesh=mesh), sharded, jnp.tile(tokens, (4, 1))
  )
  want = logits(model, params, tokens)
  np.testing.assert_allclose(got[-3:], want, atol=1e-5)


def test_reads_the_config_of_llama_3_2():
  scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
  scaling["original_max_position_embeddings"] = 8192
  spec = convert.read_spec(
    dict(
      architectures=["LlamaForCausalLM"], attention_bias=False,
      attention_dropout=0.0, bos_token_id=128000, eos_token_id=[128001, 128009],
      head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
      max_position_embeddings=131072, mlp_bias=False, model_type="llama",
      num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
      pad_token_id=None, pretraining_tp=1, rms_norm_eps=1e-05,
      rope_scaling=scaling, rope_theta=500000.0, tie_word_embeddings=True,
      torch_dtype="bfloat16", vocab_size=128256,
    )
  )  # fmt: skip
  assert spec == LanguageModelSpec(
    vocab_size=128256, width=2048, depth=16, heads=32, kv_heads=8, head_dim=64,
    mlp_dim=8192, rope_theta=5e5, rope_scaling=(32.0, 1.0, 4.0, 8192.0),
  )  # fmt: skip


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(model_type="gemma"), "model_type 'gemma'.*llama"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "scaling 'yarn'"),
    (dict(rope_scaling=LLAMA3 | dict(factor=0)), "rope_scaling.factor is 0"),
    (dict(rope_scaling=LLAMA3 | dict(low_freq_factor=8)), "less than the high"),
    (dict(rope_parameters=dict(sliding_attention=LLAMA3)), "per layer"),
    (dict(attention_bias=True), "attention_bias=True"),
    (dict(num_key_value_heads=3), "heads must divide"),
    (dict(hidden_size=None), "'hidden_size' is missing"),
  ],
)
def test_names_what_it_does_not_read(fields, message):
  with pytest.raises((ConversionError, ValueError), match=message):
    convert.read_spec({"model_type": "llama", **SIZES, **fields})
