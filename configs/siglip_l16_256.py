"""SigLIP ViT-L/16 at 256 pixels: configs/siglip_b16_224.py, larger.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/siglip_l16 --distributed \
    --config=configs/siglip_l16_256.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Hardware and time: batch 32,768 is meant for a pod of 128 chips or more. Not
trained to the end by us, so no time is given.

Expected: the published SigLIP L/16-256, on 10 billion pairs, reaches 80.5 %
zero-shot on ImageNet (MTV, Table 5).

`:tiny` trains the same recipe, shrunk, on the built-in scenes in a minute on a
laptop's CPU.
"""

import pathlib

from mtv_jax.config import schema as config_lib

BASE = pathlib.Path(__file__).with_name("siglip_b16_224.py")


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, tiny=False, batch=0, tokenizer="bytes")
  config = config_lib.read(
    f"{BASE}:res=256,variant=L,tiny={arg.tiny},batch={arg.batch},"
    f"tokenizer={arg.tokenizer}"
  )
  # Parameters and moments of L don't fit a chip whole beside its activations.
  config.mesh.fsdp = 1 if arg.tiny else 8
  return config
