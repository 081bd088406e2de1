"""Labels image shards with an expert model, on one or several hosts.

  mtv-jax label --expert=depth --weights=Depth-Anything-V2-Small-hf \\
      --data='shards/*.tar' --output=labels/depth
  mtv-jax label --expert=boxes --weights=owlv2-base-patch16-ensemble \\
      --data='shards/*.tar' --output=labels/boxes --phrases=ngrams

  mtv-jax label --expert=features --weights=dinov2-large \\
      --data='shards/*.tar' --output=labels/dino --dtype=bfloat16

On a pod, run the command on every host with --distributed. Hosts started by
hand need no flag. They divide the records among themselves, through the output:
a shared folder, gs:// or s3://. Rerunning the command resumes.
"""

import os
from typing import Literal

import jax

from mtv_jax.cli import arguments
from mtv_jax.config import origin
from mtv_jax.data import registry
from mtv_jax.data.labels.label_values import KINDS
from mtv_jax.encoder import loading
from mtv_jax.experts.build import build_expert, parse_options
from mtv_jax.experts.labelling import run as labelling
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.progress import Progress


class ExpertOptions(arguments.Flags):
  """Options passed to the expert if set.

  Args:
    phrases: ngrams, tags, tags:FIELD, or a file with one phrase per line.
    threshold: minimum score of a box.
    nms: IoU above which the lower-scoring box of two is dropped.
    max_boxes: maximum number of boxes per image.
    names: file of an .onnx detector's classes, one per line.
    preprocess: image preprocessing for depth, such as original.
    size: side of the expert's input images, in pixels.
    side: side of a stored depth map, in pixels (default: 96).
    bits: bits of a stored depth value (default: 10).
    canvas: canvas size of data.ops in training, for features.
    format: storage format of features: float8 or int8.
    dtype: float32 or bfloat16 (default: bfloat16 on accelerators).
    batch_size: images per step and device (default: 1; 16 on accelerators).
  """

  phrases: str | None = None
  threshold: float | None = None
  nms: float | None = None
  max_boxes: int | None = None
  names: str | None = None
  preprocess: str | None = None
  size: int | None = None
  side: int | None = None
  bits: int | None = None
  canvas: int | None = None
  format: str | None = None
  dtype: str | None = None
  batch_size: int | None = None


def run(
  shards: arguments.ShardFlags,
  options: ExpertOptions,
  hosts: arguments.DistributedFlags,
  *,
  expert: Literal[KINDS],
  weights: str,
  output: str,
  threads: int | None = None,
  set: list[str] = (),
) -> int:
  """Labels shards.

  Args:
    expert: kind of labels.
    weights: folder of Depth Anything V2 or OWLv2, .onnx file, run or export;
      for features, any encoder.
    output: folder of the label set, local, gs:// or s3://.
    threads: decoding threads; default: one per core.
    set: further expert options, OPTION=VALUE, as --set=min_side=0.02.
  """
  arguments.initialize_distributed(hosts)
  setup_logging(process_index=jax.process_index())
  base = registry.open_files(
    shards.data, index_dir=shards.index_dir, captions="optional"
  )
  set_options = {k: v for k, v in vars(options).items() if v is not None}
  model = build_expert(
    expert, weights, options=set_options | parse_options(set)
  )
  is_first = jax.process_index() == 0
  # Read before hours of labelling, since it may query the hub.
  origin_json = origin.to_json(loading.read_origin(os.path.expanduser(weights)))
  summary = labelling.run(
    model,
    base,
    output,
    check=is_first,
    threads=threads,
    # Process 0 reports the progress of all processes.
    **({"progress": Progress()} if is_first else {}),
  )
  if is_first:
    path = path_lib.as_path(output) / origin.FILE
    path_lib.write_bytes(path, origin_json.encode())
    print(summary.format_summary(expert, output))
  return 0
