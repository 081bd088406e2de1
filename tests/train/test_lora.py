"""LoRA continuation of released folders: training, resuming, both exports."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tower_parity as parity
from hostile import foreign_samples as samples

from mtv_jax.checkpoint.reading import load_tree
from mtv_jax.cli import main
from mtv_jax.cli.train import train
from mtv_jax.config import recipes
from mtv_jax.convert import huggingface, native, peft, tensors
from mtv_jax.convert.tables import ConversionError
from mtv_jax.encoder import loading
from mtv_jax.models import two_tower
from mtv_jax.models.lora import LoraConfig
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.train.config import resolve
from mtv_jax.train.run import build_spec
from mtv_jax.utils.errors import ConfigError, InputError, MissingFileError
from mtv_jax.utils.tree import flatten_with_names, map_with_names

_KINDS = ["siglip", "siglip2", "clip", "dinov2", "dinov3", "aimv2"]
_DINOV2 = {
  "q_proj": "attention.query",
  "k_proj": "attention.key",
  "v_proj": "attention.value",
  "o_proj": "output.dense",
}
_LORA = LoraConfig(rank=3, alpha=4.0)


def read(folder, options=""):
  config = recipes.read_config(
    f"continue_from:path={folder},data=scenes,dtype=float32,batch=8,steps=4,"
    f"lr=0.01,prototypes=16,grow=0,anchor=0.0,lora=2{options}"
  )
  config.evals = {}
  config.checkpoint = dict(every_steps=2, keep=3)
  return config


def flat(tree):
  return dict(flatten_with_names(tree))


def read_file(folder, name="model.safetensors"):
  return safetensors.numpy.load_file(folder / name)


def adapted(folder, seed=0):
  """A folder's model with random adapters."""
  model, rng = huggingface.read(folder), np.random.default_rng(seed)
  params = _LORA.add(model.params, jax.random.key(0))
  start = jax.device_get(_LORA.merge(params))
  jax.tree.map(np.testing.assert_array_equal, start, dict(model.params))

  def fill(name, leaf):
    is_up = name.endswith("lora_b")
    return rng.normal(size=leaf.shape, scale=0.1) if is_up else leaf

  params = map_with_names(fill, jax.device_get(params))
  params = jax.tree.map(np.float32, params)
  return dataclasses.replace(model, params=params)


def write_adapters(output, model, base):
  return peft.write(output, model, lora=_LORA, base=base, name=str(base))


def add_adapters(base, folder):
  """The base's tensors + alpha / r * B A, as PEFT documents its files."""
  config = json.loads((folder / "adapter_config.json").read_text())
  scale, result = config["lora_alpha"] / config["r"], dict(base)
  prefix, suffix = "base_model.model.", ".lora_A.weight"
  files = read_file(folder, "adapter_model.safetensors")
  for name in [name for name in files if name.endswith(suffix)]:
    module = name.removeprefix(prefix).removesuffix(suffix)
    if "encoder.layer." in module:  # DINOv2, as transformers 5 names layers.
      for new, old in _DINOV2.items():
        module = module.replace(new, old)
    (weight,) = (
      n for n in base
      if f".{module}.weight".endswith(f".{n}") or n.endswith(f"{module}.weight")
    )  # fmt: skip
    up = files[name.replace("lora_A", "lora_B")]
    result[weight] = base[weight] + scale * up @ files[name]
  return result


@pytest.mark.parametrize("kind", _KINDS)
def test_the_base_with_adapters_is_the_merged_export(kind, tmp_path):
  base = samples.base(kind)
  model = adapted(base)
  write_adapters(tmp_path / "peft", model, base)
  weights = read_file(base)
  expected = add_adapters(weights, tmp_path / "peft")
  family = huggingface.find_family(base, samples.CONFIGS[kind])
  prefix = family.find_prefix(samples.CONFIGS[kind], weights)
  mapping = family.param_mapping(model.spec, prefix)
  merged = tensors.save(mapping, native.numpy_leaves(_LORA.merge(model.params)))
  changed = [n for n in weights if (weights[n] != expected[n]).any()]
  for name in [n for n in merged if "embeddings" not in n]:  # Folded CLS.
    np.testing.assert_allclose(merged[name], expected[name], atol=1e-5)
  # q, k, v, out and the MLP's kernels.
  blocks = sum(
    getattr(model.spec, t).depth for t in model.params if t != "heads"
  )
  assert len(changed) == blocks * (7 if kind == "aimv2" else 6)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", _KINDS)
def test_adapters_have_the_names_of_layers(kind, tmp_path):
  """PEFT skips an adapter of another name silently."""
  transformers = pytest.importorskip("transformers")
  base = samples.base(kind)
  folder = write_adapters(tmp_path / "peft", adapted(base), base)
  model = transformers.AutoModel.from_pretrained(base)
  names = [name for name, _ in model.named_modules()]
  files = read_file(folder, "adapter_model.safetensors")
  modules = {n.split(".", 2)[2].rpartition(".lora_")[0] for n in files}
  config = json.loads((folder / "adapter_config.json").read_text())
  pattern = re.compile(config["target_modules"])
  assert modules == set(filter(pattern.fullmatch, names))


@pytest.mark.parametrize("kind", ["radio", "vit_mae", "changed", "pool"])
def test_adapters_that_peft_cannot_have(kind, tmp_path):
  base = samples.base("siglip")
  model, message = adapted(base), "differs from the run in image/norm/scale"
  if kind in ("radio", "vit_mae"):
    base = tmp_path
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    message = "weights of (Radio|ViTMAE) name layers differently.*to_hf"
  elif kind == "changed":
    model.params["image"]["norm"]["scale"] += 1
  else:
    lora = dataclasses.replace(_LORA, targets=("pool/attention",))
    params = lora.add(huggingface.read(base).params, jax.random.key(0))
    model = dataclasses.replace(model, params=params)
    message = "PEFT can't adapt vision_model.head.attention.in_proj_weight"
  with pytest.raises(ConversionError, match=message):
    write_adapters(tmp_path / "peft", model, base)
  assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
  ("variant", "rank", "text"),
  [
    ("B/16", 8, None),
    ("B/16", 8, dict(variant="B", vocab_size=32_000, length=64)),
    ("S/14", 4, None),
  ],
)
def test_share_of_trained_parameters(variant, rank, text):
  """Under 2 %: at B/16 by the default rank, at S by half of it."""
  spec = ModelSpec.from_config(dict(variant=variant, image_size=224, text=text))

  def init(key):
    return LoraConfig(rank=rank).add(two_tower.init_params(spec, key), key)

  sizes = {
    n: x.size for n, x in flat(jax.eval_shape(init, jax.random.key(0))).items()
  }
  adapters = sum(size for n, size in sizes.items() if "lora_" in n)
  assert 0.01 < adapters / sum(sizes.values()) < 0.02


@pytest.mark.slow
def test_training_resuming_and_exports(tmp_path):
  """Only adapters and heads train; a resumed run is bit-equal."""
  start, workdir = samples.base("siglip"), tmp_path / "run"
  config = read(start)
  state = jax.device_get(train(config, workdir))
  source, params = huggingface.read(start).params, flat(state.params)
  for name, value in flat(source).items():
    if not name.startswith("heads/"):
      np.testing.assert_array_equal(params[name], value, err_msg=name)
  ups = [x for name, x in params.items() if name.endswith("lora_b")]
  assert len(ups) == 8 and all(x.any() for x in ups)
  moments = {n.partition("/mu/")[2] for n in flat(state.opt_state)} - {""}
  assert moments == {n for n in params if "lora_" in n or "heads/" in n}
  shutil.rmtree(workdir / "checkpoints" / "4")
  resumed = jax.device_get(train(config, workdir))
  jax.tree.map(np.testing.assert_array_equal, resumed, state)
  for command in ("to_hf", "to_peft"):
    main.main(["convert", command, str(workdir), str(tmp_path / command)])
  expected = add_adapters(read_file(start), tmp_path / "to_peft")
  for name, value in read_file(tmp_path / "to_hf").items():
    if "logit" not in name:
      np.testing.assert_allclose(value, expected[name], atol=1e-5)
  recorded = native.read_info(tmp_path / "to_hf").origin
  assert (recorded.training, recorded.base.name) == ("lora", "siglip")
  heads = read_file(tmp_path / "to_peft", "heads.safetensors")
  assert heads.keys() == {n for n in params if n.startswith("heads/")}


def released(kind, folder):
  """A folder of transformers' own class, with random weights."""
  if kind == "dinov2":
    sizes = parity.tower(48, 3, 3, 192, image_size=70, patch_size=14)
    parity.save_model(folder, "Dinov2Model", **sizes)
  else:
    text = dict(vocab_size=64, max_position_embeddings=8, projection_size=48)
    vision = dict(patch_size=16)
    if kind == "siglip2":
      vision |= dict(num_patches=9)
    else:
      vision |= dict(image_size=48)
    parity.save_model(
      folder,
      f"{kind.title()}Model",
      vision_config=parity.tower(48, 3, 4, 96, **vision),
      text_config=parity.tower(48, 2, 4, 96, **text),
    )
    shutil.copy(samples.base("siglip") / "tokenizer.json", folder)
  size = dict(height=48, width=48)
  processor = dict(image_processor_type=f"{kind.title()}ImageProcessor")
  if kind == "dinov2":
    processor = dict(image_processor_type="BitImageProcessor", resample=3)
    size = dict(shortest_edge=80)
    processor["crop_size"] = dict(height=70, width=70)
  elif kind == "siglip2":
    processor |= dict(patch_size=16, max_num_patches=9)
  processor = json.dumps(dict(processor, size=size))
  (folder / "preprocessor_config.json").write_text(processor)
  return folder


@pytest.mark.long
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["dinov2", "siglip", "siglip2"])
def test_photos_continue_a_released_folder(kind, shared_data, tmp_path):
  start, coco = released(kind, tmp_path / "start"), shared_data / "coco"
  data = coco / "annotations" / "captions_train2017.json"
  options = f",images={coco / 'train2017'},data={data}"
  if kind == "dinov2":
    options = f",images_only,data={coco / 'train2017'}"
  config = read(start, options)
  config.ema = dict(decay=0.9)
  train(config, tmp_path / "run")
  weights = read_file(start)
  for name in ("student", "ema"):
    args = ["convert", "to_peft", str(tmp_path / "run"), str(tmp_path / name)]
    main.main([*args, f"--weights={name}"])
    args[1], args[3] = "to_hf", str(tmp_path / f"{name}_hf")
    main.main([*args, f"--weights={name}"])
    expected = add_adapters(weights, tmp_path / name)
    merged = read_file(tmp_path / f"{name}_hf")
    for key in [k for k in merged if not re.search("logit|embeddings", k)]:
      np.testing.assert_allclose(merged[key], expected[key], atol=1e-5)


@pytest.mark.long
def test_self_distillation_of_adapters(tmp_path):
  """The EMA teacher averages adapters, so it has adapters to export, too."""
  start, workdir = samples.base("dinov2"), tmp_path / "run"
  config = read(start, ",images_only")
  config.objectives.ibot.weight = dict(value=1.0, start_steps=2)
  train(config, workdir)
  family = huggingface.find_family(start, samples.CONFIGS["dinov2"])
  mapping = family.param_mapping(huggingface.read(start).spec)
  for weights in ("student", "teacher"):
    output = tmp_path / weights
    main.main(
      ["convert", "to_peft", str(workdir), str(output), f"--weights={weights}"]
    )
    merged = loading.read_model(workdir, weights=weights).params["image"]
    written = tensors.save(mapping, native.numpy_leaves({"image": merged}))
    expected = add_adapters(read_file(start), output)
    for name in [n for n in written if "embeddings" not in n]:
      np.testing.assert_allclose(written[name], expected[name], atol=1e-5)
  # Adapters are merged into the start of the next run.
  config = read(workdir, ",images_only")
  train(config, tmp_path / "next")
  got = flat(load_tree(tmp_path / "next", part="params/image", step=4))
  merged = loading.read_model(workdir, weights="teacher").params["image"]
  name = "blocks/mlp/fc1/kernel"
  np.testing.assert_array_equal(got[name], flat(merged)[name])
  with pytest.raises(SystemExit, match="config.json"):
    main.main(["convert", "to_peft", str(tmp_path / "next"), str(output)])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(targets=("/qvk/",)), "config.lora.targets: '/qvk/' matches no"),
    (dict(train=("/nrom",)), "config.lora.train: '/nrom' matches no param"),
    (dict(rank=0), "config.lora.rank is 0, expected an integer >= 1"),
  ],
)
def test_bad_options(options, message):
  config = read(samples.base("siglip"))
  config.lora = options
  with pytest.raises((ConfigError, InputError), match=message):
    build_spec(resolve(config), 4)


def test_a_start_is_needed(tmp_path):
  with pytest.raises(ConfigError, match="config.lora adapts a loaded encoder"):
    resolve(recipes.read_config("continue_from:tiny,lora=4"))
  with pytest.raises(SystemExit, match="is not a run with config.lora"):
    folder = str(samples.base("siglip"))
    main.main(["convert", "to_peft", folder, str(tmp_path / "out")])
  model = huggingface.read(folder)
  with pytest.raises(MissingFileError, match="There is no.*The run continued"):
    write_adapters(tmp_path / "out", model, tmp_path / "moved")
