"""TIPS (Maninis et al. 2025, arXiv 2410.16512), ViT-B/14 at 224 pixels.

Command, on every host of a TPU pod:

  python -m mtv_jax.main --workdir=/data/runs/tips_b14 --distributed \
    --config=configs/tips_b14.py:tokenizer=/data/c4_en.model \
    --config.data.train[0].path='/data/web/{00000..09999}.tar'

Published values: google-deepmind/tips at 4db271d, without training code (C);
the paper, appendix A.2 and tables 1 and 11, from readers' notes (P). The
released B is distilled from g; the values here are from the paper's ablations,
which train a B.

  hyper-parameter      published                           ours
  data (P)             116M images of WebLI, each with a   user-supplied path
                       web and a synthetic caption
  CLS tokens (C)       2, one for each kind of caption     1
  batch, epochs (P)    16k, 70                             16,384; 8.1B examples
  contrast (C)         softmax, one temperature, no bias   =
  weights (P)          contrast 1, DINO 1, iBOT 2          =
  crops (P)            1 global, shared with contrast;     1; 8 local ones
                       local ones for the student
    crops of           not seen                            a canvas of 384 x 384
  masks (P)            75 % of the global crop, random;    blocks of 75 %
                       blocks are as good (table 11)
  prototypes (P)       32k                                 32,768
  KoLeo                none known                          none
  image tower (C)      CLS, layer scale, GELU tanh         =
  positions (C)        learned, resized bilinearly         =
  pixels (C)           0 to 1                              =
  text tower (C)       12 layers, ReLU, fixed sines, mean  =
                       over the tokens, no projection
    dropout (C)        0.1 by default                      none
    padding (C)        masked; no end of text              =: both are one token
  vocabulary (C)       32k SentencePiece, lower case, 64   =
  optimizer, rates     not seen                            SigLIP's
  teacher momentum     not seen                            0.994
  temperature          not seen                            CLIP's start, bound

`:v2` adds TIPSv2's changes (arXiv 2604.12012, sections 3 and 4.1, from readers'
notes): targets also on visible patches (iBOT++), an EMA of only the heads, 6
local crops of 98 pixels without colour augmentation, 90,000 steps at batch
8,192. Missing: Adafactor, a third kind of captions, 9,000 steps at 448 pixels.

Hardware and time: batch 16,384 is sized for 256 v5e chips. Not trained to
completion here; time unknown.

Expected: unknown; published figures do not apply.

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes.
"""

from mtv_jax.config.recipes import parse_arg, read_config

# Scales embeddings by sqrt(width); no projection after the mean over tokens.
TEXT_TOWER = dict(
  gelu="relu",
  positions="sinusoidal",
  token_scale=True,
  pool="mean",
  projection=None,
)


def get_config(arg=None):
  arg = parse_arg(
    arg,
    tiny=False,
    batch=0,
    res=224,
    variant="B",
    patch=14,
    tokenizer="",
    v2=False,
  )
  base = {k: v for k, v in arg.items() if k not in ("patch", "v2")}
  config = read_config("mtv_b16_224", **base)
  size, patch = (32, 8) if arg.tiny else (arg.res, arg.patch)
  config.data.ops = config.data.ops.replace("|depth(96)|regions(4)", "")
  if not arg.tiny:
    del config.data.train[0]["labels"]
    del config.evals["relative_depth"], config.evals["grounding"]
    config.model.variant = f"{arg.variant}/{patch}"
    # Local crops: a multiple of the patch.
    local = config.views.local.ops.replace("crop(96,", f"crop({7 * patch},")
    config.views.local.ops = local
  config.model.update(
    pool="cls",
    layer_scale=1e-5,
    position_resize="bilinear_antialiased",
    image_mean=0.0,
    image_std=1.0,
  )
  text = config.model.text
  text.clean = "lower"
  # Excludes padding, which is the end of text in a SentencePiece model.
  pads_with_zero = text.tokenizer.endswith((".json", "bytes", "words"))
  text.update(pad_id=0 if pads_with_zero else 1, **TEXT_TOWER)

  # Contrast and DINO's teacher share the encoding of one unmasked crop. iBOT
  # encodes this crop again, masked.
  crop = f"crop({size}, 0.32, 1.0)|flip"
  masks = f"blocks(0.75, 0.75, p=1.0, patch={patch})"
  config.views.image.ops = crop
  config.views.masked = dict(count=1, ops=f"{crop}|{masks}", crops_of="image")
  del config.views["global"]

  objectives = config.objectives
  del objectives["depth"], objectives["grounding"]
  objectives.contrastive = dict(
    weight=1.0, loss_type="softmax", max_scale=100.0
  )
  objectives.dino.update(
    weight=1.0, koleo_weight=0.0, view_global="image", same_crop="exclude"
  )
  objectives.ibot.update(weight=2.0, view="masked")
  if not arg.tiny:
    objectives.dino.prototypes = 32_768
    objectives.ibot.prototypes = 32_768
    config.total_examples = 70 * 116_000_000
  if arg.v2:
    objectives.ibot.patches = "all"
    config.teacher.ema = "heads"
  if arg.v2 and not arg.tiny:
    config.batch_size = arg.batch or 8192
    config.total_examples = 90_000 * 8192
    local = config.views.local.ops.partition("|")[0]
    config.views.local = dict(count=6, ops=f"{local}|flip")
  return config
