"""LiT: a text tower learns to read a locked ViT-B/16, on web pairs.

Command, on every host of a TPU pod; `init` is a run, an export or a Hugging
Face folder whose image tower has the shape of this one:

  python -m mtv_jax.main --workdir=/data/runs/lit_b16 --distributed \
    --config=configs/siglip_lit_b16_224.py:init=/data/runs/mtv_b16,\
tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: a step costs the image tower's forward pass and the text
tower's training, about half of configs/siglip_b16_224.py, and keeps neither
moments nor activations of the image tower; 16 chips are enough. Not trained to
the end by us, so no time is given.

Expected: with the giant image tower of LiT and a sigmoid loss, the published
SigLiT reaches 84.5 % zero-shot on ImageNet after two days on four TPU v4 chips
(Zhai et al. 2023). A tower of size B: less; not more than its own features say.

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU; its locked tower is a random one.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("siglip_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(
    arg,
    tiny=False,
    batch=0,
    res=224,
    variant="B",
    init="/data/runs/mtv_b16",
    tokenizer="bytes",
  )
  batch = arg.batch or (64 if arg.tiny else 16_384)
  config = config_lib.read(
    f"{BASE}:res={arg.res},variant={arg.variant},tiny={arg.tiny},batch={batch},"
    f"tokenizer={arg.tokenizer}"
  )
  if not arg.tiny:
    config.init = dict(path=arg.init, include=("^image/",))
    config.total_examples = 1_000_000_000  # Our choice.
  # Locked from the first step to the last (Zhai et al. 2022, LiT). What has
  # no rate is not differentiated and has no moments.
  config.optim.rules = [("^image/", dict(lr=0.0))]
  return config
