"""CLIP ViT-B/16 at 224 pixels on web image-text pairs (Radford et al. 2021).

Command, on every host of a TPU pod; the tokenizer is CLIP's tokenizer.json:

  python -m mtv_jax.main --workdir=/data/runs/clip_b16 --distributed \
    --config=configs/clip_b16_224.py:tokenizer=/data/clip/tokenizer.json \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Published values: arXiv 2103.00020, sections 2.4 and 2.5, tables 18 and 20
(secondary transcriptions); openai/CLIP and mlfoundations/open_clip at 89fb801
for details missing from the paper.

  hyper-parameter       published                          ours
  data                  400M pairs (not released)          user-supplied path
  batch, epochs         32,768, 32                         = (12.8B examples)
  rate, warm-up         5e-4, 2,000 steps, cosine to 0     =
  weight decay          0.2, except gains and biases       =
  Adam                  0.9, 0.98, 1e-6                    =
  clipping              none                               =
  temperature           starts at 0.07, scale up to 100    =
  image tower           B/16, norm before the blocks, CLS  =
  text tower            12 blocks of 512, causal, 77       =
                        tokens, end-of-text token
  GELU                  quick (x sigmoid(1.702 x))         =
  embedding             512                                =
  vocabulary            49,408 byte pairs, lower case      =
  texts                 ftfy, HTML entities, spaces        =
  image                 random square crop                 0.9 to 1.0 of the
                                                           area, as in open_clip
    crops of            resized images                     a canvas of 256 x 256
  pixels                CLIP's mean and deviation          =
  initialisation        CLIP's                             =
  precision             float16                            bfloat16

The released B/16 was not trained further at a higher resolution.

Hardware and time: batch 32,768 is sized for 64 v5e chips, 512 images per
chip, with full rematerialisation. Not trained to completion here; time unknown.

Expected: the released CLIP B/16 reaches 68.3 % zero-shot on ImageNet; accuracy
depends on the data. tokenizer=bytes is for smoke tests only.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="")
  config = read_config("siglip_b16_224", **arg)
  tokenizer = config.model.text.tokenizer
  # Vocabulary sized by the data; the end-of-text id is 1.
  is_other = tokenizer == "bytes" or tokenizer.startswith("train:")
  config.objectives = dict(
    contrastive=dict(weight=1.0, loss_type="softmax", max_scale=100.0)
  )
  config.model.update(
    pool="cls",
    pre_norm=True,
    patch_bias=False,
    gelu="quick",
    norm_eps=1e-5,
    projection=512,
    init="clip",
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
  )
  config.model.text = dict(
    variant="mu" if arg.tiny else "B",
    length=77,
    tokenizer=tokenizer,
    clean="lower" if is_other else "clip",
    vocab_size=None if is_other else 49_408,
    pool="eos",
    eos_id=1 if is_other else 49_407,
    causal=True,
    gelu="quick",
    norm_eps=1e-5,
    projection_bias=False,
  )
  # SigLIP uses 64 tokens.
  config.data.ops = config.data.ops.replace("caption(64)", "caption(77)")
  config.optim = dict(
    name="adamw",
    lr=5e-4,
    weight_decay=0.2,
    b2=0.98,
    eps=1e-6,
    clip_norm=0.0,
    # Embeddings decay too; by default only kernels do.
    rules=[("(position|token)_embedding$", dict(weight_decay=1.0))],
  )
  if arg.tiny:
    config.optim.lr = 1e-3
    return config

  config.model.text.update(width=512, heads=8, mlp_dim=2048)
  config.data.ops = f"decode|canvas({arg.res * 8 // 7})|caption(77)"
  config.views.image.ops = f"crop({arg.res}, 0.9, 1.0, method='bicubic')"
  config.total_examples = 32 * 400_000_000
  config.schedule = dict(name="cosine", warmup_steps=2000)
  return config
