"""TIPS ViT-B/16: configs/tips_b14.py with patches of 16.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/tips_b16 --distributed \
    --config=configs/tips_b16_224.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Published values and deviations: the table in configs/tips_b14.py.

Hardware and time: batch 16,384 is sized for 64 or more chips. Not trained to
completion here; time unknown.

Expected: unknown; published figures do not apply.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="")
  return read_config("tips_b14", patch=16, **arg)
