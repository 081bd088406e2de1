"""After TIPS (Maninis et al. 2025), ViT-B/16 at 224 pixels: one shared crop.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/tips_b16 --distributed \
    --config=configs/tips_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: batch 16,384 is sized for 64 or more chips. Not trained to
completion here; no time given.

Expected: no published figure applies: TIPS also trains on synthetic captions,
with a second CLS token for them, and on 116 million images.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.schema import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="")
  config = read_config("mtv_b16_224", **arg)
  config.data.ops = config.data.ops.replace("|depth(128)|regions(4)", "")
  if not arg.tiny:
    del config.data.train[0]["labels"]

  # The caption and DINO's teacher share one crop and its encoding. iBOT's crop
  # is masked, which no caption should see: another crop and encoding.
  crop = f"crop({config.model.image_size}, 0.32, 1.0)|flip"
  masked = config.views["global"].ops.split("|")[-1]
  config.views.image.ops = crop
  config.views["masked"] = dict(count=1, ops=f"{crop}|{masked}")
  del config.views["global"]

  objectives = config.objectives
  del objectives["depth"], objectives["grounding"]
  objectives.distillation.view_global = "image"
  objectives.distillation.same_crop = "exclude"
  objectives.masked_latent.view = "masked"
  # On the vector that contrast uses too; our choice.
  objectives.distillation.koleo_weight = 0.1
  # Our choice.
  objectives.distillation.weight, objectives.masked_latent.weight = 1.0, 2.0
  return config
