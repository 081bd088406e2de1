"""LLaVA-1.5: a language model on a frozen encoder (Liu et al. 2024).

Stage 1 trains the connector on captions, stage 2 also the language model, or
adapters of it (`lora=128`), on conversations in LLaVA's JSON:

  python -m mtv_jax.main --workdir=runs/1 --config=configs/llava.py:stage=1,\
encoder=google/siglip-large-patch16-256,language_model=Qwen/Qwen2.5-0.5B,\
data=blip_laion_cc_sbu_558k.json,images=images
  python -m mtv_jax.main --workdir=runs/2 --config=configs/llava.py:stage=2,\
encoder=runs/1,template=chatml,data=llava_v1_5_mix665k.json,images=images

`encoder` is a run, an export, a released folder or a baseline (`random:B/16`,
`pixels:224`); in stage 2, the run of stage 1. `language_model` is a folder or
hub model of transformers, or a run; by default the encoder's, or a new one of
`width` and `depth`. Stage 0 trains it on text alone. `layer=-2`, as in LLaVA,
reads the last block but one, `3+-1` concatenates two; `select`: `patches`,
`all`, `pooled`. `weights` selects a run's weights, as in `mtv_jax.load`.

Hardware: not run at full size.
"""

import re

from ml_collections import ConfigDict

from mtv_jax.config.recipes import parse_arg
from mtv_jax.utils.errors import ConfigError

DECODER = "heads/language_model/decoder"


def get_config(arg=None):
  arg = parse_arg(
    arg, stage=1, encoder="", weights="", language_model="", data="", images="",
    layer="-2", select="patches", template="", tokenizer="", length=0, lora=0,
    width=192, depth=4, batch=0, lr=0.0, optim="adamw", epochs=1, steps=0,
    dtype="bfloat16", remat="full", tiny=False,
  )  # fmt: skip
  if arg.stage not in (0, 1, 2):
    raise ConfigError(f"llava: stage={arg.stage}; expected 0, 1 or 2.")
  if arg.tiny:
    arg.update(
      encoder=arg.encoder or "random:mu/8@32", data=arg.data or "scenes",
      dtype="float32", width=32, depth=2, batch=arg.batch or 8,
      steps=arg.steps or 20, length=arg.length or 96,
    )  # fmt: skip
  elif not (arg.encoder and arg.data):
    raise ConfigError("llava: pass encoder=CHECKPOINT and data=JSON.")
  is_tuned = arg.stage != 1  # The language model trains.
  if arg.select == "pooled" and arg.encoder.startswith("pixels:"):
    raise ConfigError("llava: pixels have no pooled embedding.")
  if arg.optim == "muon" and arg.lora:
    raise ConfigError("llava: Muon can't train adapters: remove lora=.")

  config = ConfigDict(dict(seed=0))
  config.batch_size = arg.batch or (128 if arg.stage == 2 else 256)
  if arg.steps:
    config.total_steps = arg.steps
  else:
    config.total_epochs = arg.epochs
  config.xla_flags = "quick" if arg.tiny else ""
  config.model, connector, head, weights = read_encoder(arg)
  size = config.model.preprocess["size"]
  method = config.model.preprocess.get("interpolation", "bilinear")
  language_model, tokenizer, is_new = read_language_model(arg, head)

  if arg.data == "scenes":  # Captions as answers, without a question.
    source = dict(type="scenes", size=size)
  else:
    source = dict(type="conversations", path=arg.data)
    source |= dict(images=arg.images) if arg.images else {}
    source |= dict(text_only=True) if arg.stage == 0 else {}
  template = arg.template or ("plain" if arg.stage == 1 else "vicuna")
  length = arg.length or (2048 if arg.stage == 2 else 256)
  conversation = f"{length}, tokenizer={tokenizer!r}, template={template!r}"
  config.data = dict(
    train=[source], ops=f"decode|canvas({size})|conversation({conversation})"
  )
  config.views = dict(image=dict(ops=f"resize({size}, method={method!r})"))
  config.objectives = dict(
    next_token=dict(**language_model, **connector, remat=arg.remat)
  )

  config.init = dict(path=arg.encoder, weights=weights, grow_heads=is_new)
  if arg.language_model:
    config.init.language_model = arg.language_model
  rules = [("^image/", dict(lr=0.0))]
  if arg.lora and is_tuned:
    config.lora = dict(rank=arg.lora, alpha=2.0 * arg.lora, modules=(DECODER,))
    rules.append(("^heads/language_model/connector/", dict(lr=0.1)))
  elif not is_tuned:
    rules.append((f"^{DECODER}/", dict(lr=0.0)))
  lr = arg.lr or (1e-3 if arg.stage < 2 else 2e-4 if arg.lora else 2e-5)
  config.optim = dict(name=arg.optim, lr=lr, weight_decay=0.0, clip_norm=1.0)
  config.optim.rules = rules
  config.schedule = dict(name="cosine", warmup_percent=3)
  config.mesh = dict(data=1, fsdp=-1)
  config.checkpoint = dict(every_percent=10, keep=1)
  config.log = dict(every_steps=10)
  return config


def read_encoder(arg):
  """Reads the `model` section, connector options, head and weights."""
  from mtv_jax.encoder import loading  # Deferred: imports JAX.
  from mtv_jax.models.heads.language_model import LanguageHead

  info = loading.read_model_info(arg.encoder)
  if not re.fullmatch(r"-?\d+(\+-?\d+)*", arg.layer):
    raise ConfigError(f"llava: layer={arg.layer}; expected N or N+N, as 3+-1.")
  is_short = arg.layer == "-2" and info.spec.image.depth == 1
  layers = (*map(int, ["-1"] if is_short else arg.layer.split("+")),)
  connector = dict(layer=layers if len(layers) > 1 else layers[0])
  connector |= {} if arg.select == "patches" else dict(select=arg.select)
  head = LanguageHead(**connector).resolve(info.spec)
  model = ConfigDict(info.model_config() | dict(dtype=arg.dtype))
  model.text = None
  weights = arg.weights or loading.default_weights(arg.encoder)
  return model, connector, head, weights


def read_language_model(arg, head):
  """Reads the language model's options, tokenizer, and whether it is new."""
  from mtv_jax.data import tokenizers
  from mtv_jax.encoder import loading  # Deferred: imports JAX.

  is_new = bool(arg.language_model)
  is_new = is_new or not loading.has_language_model(arg.encoder)
  path = arg.language_model if is_new else arg.encoder
  if path:
    source = loading.read_language_model(path, with_params=False)
    options, tokenizer = source.options, arg.tokenizer or source.tokenizer
    if not is_new and tokenizer != source.tokenizer:
      raise ConfigError("llava: remove tokenizer=; stage 1 has one.")
    expected = head if is_new else source.head
    if (expected.layer, expected.select) != (head.layer, head.select):
      raise ConfigError(f"llava: set layer= and select= as in {path}.")
  else:
    tokenizer = arg.tokenizer or "bytes"
    ids = tokenizers.build_tokenizer(tokenizer, clean="none").vocab_size
    options = dict(  # The embeddings' rows: a multiple of 16 for matrix units.
      vocab_size=-(-ids // 16) * 16, width=arg.width, depth=arg.depth,
      heads=arg.width // 32 * 2, kv_heads=arg.width // 32,
      mlp_dim=4 * arg.width, rope_theta=10_000.0, norm_eps=1e-6,
    )  # fmt: skip
  if not tokenizer:
    raise ConfigError(f"llava: {path} has no tokenizer.json: set tokenizer=.")
  return options, tokenizer, is_new
