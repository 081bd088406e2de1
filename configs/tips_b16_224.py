"""After TIPS (Maninis et al. 2025), ViT-B/16 at 224 pixels: one shared crop.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/tips_b16 --distributed \
    --config=configs/tips_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: batch 16,384 is meant for a pod of 64 chips or more. Not
trained to the end by us, so no time is given.

Expected: no figure of ours or the paper's fits: TIPS also trains on synthetic
captions, with a second CLS token for them, and on 116 million images.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("mtv_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg, tiny=False, batch=0, res=224, variant="B", tokenizer="bytes"
  )
  config = config_lib.read(
    f"{BASE}:res={arg.res},variant={arg.variant},tiny={arg.tiny},"
    f"batch={arg.batch},tokenizer={arg.tokenizer}"
  )
  source = config.data.train[0]
  size = config.model.image_size
  config.data.ops = f"decode|canvas({40 if arg.tiny else 384})|caption(64)"
  if not arg.tiny:
    del source["labels"]

  # The caption and DINO's teacher see the same crop: one encoding of it serves
  # contrast and distillation. iBOT's has holes, which no caption should see,
  # so it is another crop with encodings of its own.
  crop = f"crop({size}, 0.32, 1.0)|flip"
  masked = config.views["global"].ops.split("|")[-1]
  config.views.image.ops = crop
  config.views["masked"] = dict(count=1, ops=f"{crop}|{masked}")
  del config.views["global"]

  entries = config.objectives
  del entries["depth"], entries["grounding"]
  entries.distillation.view_global = "image"
  entries.distillation.same_crop = "exclude"
  entries.masked_latent.view = "masked"
  # TIPS's weights as we remember them.
  entries.distillation.weight, entries.masked_latent.weight = 1.0, 2.0
  return config
