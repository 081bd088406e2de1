"""MTV ViT-B/16 at 224 pixels: every objective in one step.

Command, on every host of a TPU pod, with label sets from `mtv-jax label` or
`mtv-jax make_labels`:

  python -m mtv_jax.main --workdir=/data/runs/mtv_b16 --distributed \
    --config=configs/mtv_b16_224.py:tokenizer=/data/c4_en.model,\
data=/data/web,depth=/data/web_depth,boxes=/data/web_boxes,\
imagenet=/data/imagenet,coco=/data/coco,nyu=/data/nyu,ade20k=/data/ade20k

Published values: the abstract, the repository Becomebright/MTV at 39af761 and
its model card; rows marked * come from readers' notes on the paper.

  hyper-parameter     published                    ours
  towers              "SigLIP architecture", B/16  SigLIP's: MAP, 64 tokens,
                      at 224; details not stated   32k SentencePiece
  data                100M images, not released    user-supplied path
  contrast*           sigmoid, weight not stated   weight 1
  self-supervision*   self-distillation and        DINO and iBOT, weights 1
                      masked prediction
    heads, targets    not stated                   65,536 prototypes, Sinkhorn
    KoLeo             not stated                   0.1, 64-row groups (DINOv2)
    masks, crops      not stated                   half of the patches; 1 global
                                                   crop, 8 local, as in SigLIP 2
    momentum          not stated                   0.994, constant as in SILC
  depth               by Depth Anything V2; DPT*   =, weight 1
    loss              not stated                   see objectives/depth.py
  grounding           by OWLv2; box prompter       =, weight 1
                      and the sigmoid loss*
    box names         RAM++ tags                   the label set's: a field of
                                                   tags (--phrases=tags)
  weights*            constant, not stated         constant, 1
  optimizer, batch    not stated                   SigLIP's, 16,384; 1B images

Hardware and time: batch 16,384 fits 256 v5e chips (margins in docs/pods.md;
set `accumulate` on fewer). On the topologies in `TOPOLOGIES`, blocks save most
activations, otherwise none. Not trained to completion here; time unknown.

Expected: the released MTV B/16, trained on 100 million images (epochs are not
published), reaches 69.5 % zero-shot on ImageNet and an RMSE of 0.469 m on
NYUv2 (MTV, Table 5).

`:shared_crop` encodes the whole image once for all objectives, masking patches
of every second image: 79 % of the FLOPs (docs/results.md). On the study's
scenes its means of five seeds are worse on every axis, which the masks cause
(docs/study/ladder.md).

`:tiny` shrinks the recipe to a minute on a laptop CPU, on the built-in scenes;
configs/mtv_tiny.py is the recipe for a CPU.
"""

from mtv_jax.config.data_arguments import benchmarks
from mtv_jax.config.recipes import parse_arg, read_config
from mtv_jax.configs import _multi_task

# 94 % of matmul FLOPs are not recomputation, 82 % with "full".
_REMAT = "model.remat=full|image=qkv,attention_out,mlp_hidden"
_REMAT += "|local=attention_out,mlp_hidden|text=qkv,attention_out,mlp_hidden"
# Overrides of this recipe by topology, see `recipes.read_settings`.
TOPOLOGIES = {
  "v5e:16x16": ("mesh.fsdp=8", _REMAT),
  "v6e:16x16": (_REMAT,),
  "v5p:4x4x8": (_REMAT,),
}


def get_config(arg=None):
  arg = parse_arg(arg, tiny=False, batch=0, res=224, variant="B", tokenizer="",
                  shared_crop=False)  # fmt: skip
  # Towers, optimizer, evaluations, mesh and tokenizer of SigLIP.
  siglip = {k: v for k, v in arg.items() if k != "shared_crop"}
  config = read_config("siglip_b16_224", **siglip)
  config.batch_size = arg.batch or (16 if arg.tiny else 16_384)
  config.data.ops = ops = "decode|canvas(384)|caption(64)|depth(96)|regions(4)"
  config.data.train[0]["labels"] = dict(
    depth="/data/web_depth", boxes="/data/web_boxes"
  )
  # Sides of image, patch and local crops; the initial bias for a pod's batch
  # (configs/siglip_b16_224.py). Then the heads of DINO and iBOT.
  size, patch, local, bias = arg.res, 16, 96, -10.0
  prototypes = dict(prototypes=65_536)
  if arg.tiny:
    size, patch, local, bias = 32, 8, 16, -4.0
    prototypes.update(prototypes=64, hidden=64, bottleneck=32, chunk=None)
  _multi_task.set_terms(
    config,
    weights=dict(
      contrastive=1.0, dino=1.0, ibot=1.0, depth=1.0, grounding=1.0
    ),
    loss_type="sigmoid",
    init_bias=bias,
    koleo_weight=0.1,
    optim=config.optim,  # SigLIP's.
    # 5,000 steps of the whole recipe.
    warmup_percent=10 if arg.tiny else 8,
    momentum=0.994,  # Constant (SILC).
    prototypes=prototypes,
    regions=4,
    # The student's global crop is masked: it differs from the teacher's input.
    same_crop="include",
    # One global crop, half masked for the student, and eight local crops, as in
    # SigLIP 2, with the colours of DINOv2's local crops.
    views=dict(
      size=size, patch=patch, crop=(size, 0.32), local=(8, local, 0.05, 0.32),
      colours="flip|jitter(0.8)|grey(0.2)|blur(0.5)", masks="0.5, 0.5, p=1.0",
    ),
  )  # fmt: skip
  if arg.shared_crop:
    _multi_task.share_crop(config, size, patch)
  config.checkpoint.keep_every = 20_000

  if arg.tiny:
    config.update(
      total_steps=40,
      data=dict(
        train=[dict(type="scenes", size=40)],
        ops=ops.replace("canvas(384)", "canvas(40)"),
      ),
      evals=dict(zero_shot=dict(count=100), retrieval=dict(count=100)),
    )
    config.log.gradients_steps = None
  else:
    config.total_examples = 1_000_000_000
    config.log.gradients_steps = 2000
    names = ("imagenet", "coco", "nyu", "ade20k", "navi", "spair", "davis")
    config.evals = benchmarks(config, *names)
  return config
