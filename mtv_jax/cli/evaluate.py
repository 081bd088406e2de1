"""Evaluates encoders: runs, exports, Hugging Face folders, baselines.

    mtv-jax evaluate --encoder=runs/a --evals=zero_shot,retrieval
    mtv-jax evaluate --encoder=runs/a --encoder=pixels:64 --evals=all \\
      --data=scenes --output=results/a
    mtv-jax evaluate --encoder=siglip-base-patch16-224 --evals=all \\
      --data=zero_shot=imagenet/val --set=zero_shot.prompts=imagenet.json \\
      --data=retrieval=coco/dataset_coco.json --set=retrieval.max_captions=5 \\
      --output=results/siglip --compare=results/a/results.json

    mtv-jax evaluate --encoder=runs/a --evals=vqa --output=results/a \\
      --llava=stage=1,language_model=lm,data=captions.json \\
      --llava=stage=2,data=questions.json
    mtv-jax evaluate --study=studies/ladder --evals=compositionality

--output receives results.json, results.md, charts, sheets of images, and a
self-contained report.html. --evals=all lists unsupported evaluations as
skipped.

With --output, rerunning the command resumes: an evaluation is skipped if a
result with identical settings, encoder and data files is stored in
OUTPUT/encoders. Image features are kept in OUTPUT/features, or in --features.

`mtv-jax report STUDY` shows what --study adds to the runs' own evaluations.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import jax

import mtv_jax
from mtv_jax.cli import arguments
from mtv_jax.cli.main import run_command
from mtv_jax.encoder import loading
from mtv_jax.evals import run as evals
from mtv_jax.evals import store, suite
from mtv_jax.evals.core import base, examples, results
from mtv_jax.evals.core.feature_cache import FeatureFolder
from mtv_jax.evals.encoder_requests import Request, parse_requests
from mtv_jax.evals.published import SIZES
from mtv_jax.parallel.distributed import gather_json, gather_results
from mtv_jax.report import evaluations, tables
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import ConfigError
from mtv_jax.utils.text import file_name


class DataOptions(arguments.Flags):
  """Options passed to the evaluations if set.

  Args:
    images: folder of images; default: beside the JSON.
    prompts: class names and templates: JSON, text or a folder.
    templates: text file with one prompt template per line.
    classes: all (of the prompts), dataset, or present (in the data).
    split: split of Karpathy's JSON; default: test.
    count: number of images, evenly spaced; default: all.
    batch_size: images per step, over all devices.
    pictures: items per sheet; default: 8 with --output, else no sheets.
  """

  images: str | None = None
  prompts: str | None = None
  templates: str | None = None
  classes: str | None = None
  split: str | None = None
  count: int | None = None
  batch_size: int | None = None
  pictures: Annotated[int | None, 0] = None


class Evaluations(DataOptions):
  """Flags that choose evaluations and data, and --reference.

  Args:
    evals: names separated by commas, or all.
    data: scenes (the default), a folder of classes, COCO's or Karpathy's JSON,
      or tars; or NAME=DATA for one evaluation; may be repeated.
    set: NAME.OPTION=VALUE sets any option of an evaluation, as
      --set=retrieval.max_captions=5.
    published: train probes for the full published schedule; by default for at
      most 100 passes over the images, and fewer on scenes.
    reference: size of the published encoders in the chart, or none.
    features: folder for image features, shared between evaluations and between
      commands, or none; default: OUTPUT/features.
    features_gb: size limit of this folder; the least recently used features are
      removed.
  """

  evals: str = "all"
  data: list[str] = ()
  set: list[str] = ()
  published: bool = False
  reference: Literal[*SIZES, "none"] = "base"
  features: str | None = None
  features_gb: int = 64


class Flags(Evaluations, arguments.WeightFlags, arguments.DistributedFlags):
  """Flags of `mtv-jax evaluate`.

  Args:
    encoder: folder to load, or a baseline (pixels:64, random:B/16@224);
      PATH@ema selects the weights, NAME=PATH sets the name in tables; may be
      repeated, for one column each.
    study: folder of a study, whose finished runs are the encoders.
    output: folder for tables, sheets and the page; default with --study:
      STUDY/evaluations.
    compare: earlier results.json files, separated by commas.
    json: also write the results to this file.
    llava: arguments of configs/llava.py, such as stage=1,data=captions.json;
      once per stage, in order. Trains on each encoder, in OUTPUT/llava,
      before --evals=vqa. Rerunning the command resumes.
  """

  encoder: list[str] = ()
  study: str | None = None
  llava: list[str] = ()
  output: str | None = None
  compare: str | None = None
  json: str | None = None


EPILOG = f"evaluations: {', '.join(base.EVALUATORS)}"


def read_plan(args: Evaluations) -> evals.EvaluationPlan:
  """Builds the evaluation plan from the flags."""
  names = [field.name for field in dataclasses.fields(DataOptions)]
  options = {name: getattr(args, name) for name in names}
  return evals.plan(
    args.evals.split(","),
    data=args.data or ["scenes"],
    options=options | {"published": args.published or None},
    preferences={"pictures": 8} if args.output else {},
    assignments=args.set,
  )


def run(args: Flags) -> None:
  """Evaluates and writes the results; raises SystemExit listing failures."""
  arguments.initialize_distributed(args)
  args = add_study_runs(args)
  plan = read_plan(args)
  if args.output:
    arguments.check_writable(args.output)
  features = open_features(args)
  paths = args.compare.split(",") if args.compare else []
  earlier = [outcome for path in paths for outcome in results.read(path)]
  requests = parse_requests(args.encoder, weights=args.weights)
  if args.llava:
    requests = [train_language_model(request, args) for request in requests]
  if args.output:
    encoders = stored_encoders(requests, args.output, args.dtype)
  else:
    encoders = {
      r.name: mtv_jax.load(r.path, weights=r.weights, dtype=args.dtype)
      for r in requests
    }
  outcomes = suite.evaluate(
    encoders,
    plan,
    checkpoints={request.name: request.checkpoint for request in requests},
    folder=args.output,
    features=features,
    log_fn=functools.partial(print, file=sys.stderr, flush=True),
  )
  if jax.process_index() == 0:
    if any(outcome.results for outcome in outcomes):
      print(tables.format_results([*outcomes, *earlier]))
    if args.json:
      results.write(args.json, outcomes)
    if args.output:
      options = dict(compared=earlier, size=args.reference)
      files = evaluations.write_evaluation(args.output, outcomes, **options)
      print("\nWritten:", *files, sep="\n  ")
  if failed := suite.errors(outcomes, plan):
    raise SystemExit("evaluate: " + "\n".join(failed))


def add_study_runs(args: Flags) -> Flags:
  """Returns the flags with the encoders and default output of --study."""
  if bool(args.study) == bool(args.encoder):
    raise ConfigError("pass either --encoder or --study")
  if not args.study:
    return args
  from mtv_jax.studies import runner  # Deferred: slow to import.

  study = pathlib.Path(args.study)
  # The study may still be training: all processes use process 0's list.
  names = gather_results(lambda: [r.name for r in runner.finished_runs(study)])
  runs = names[0]
  if not runs:
    raise ConfigError(f"--study={study} has no finished run to evaluate")
  return dataclasses.replace(
    args,
    encoder=[f"{name}={study / runner.RUNS / name}" for name in runs],
    output=args.output or str(study / runner.EVALUATIONS),
  )


def train_language_model(request: Request, args: Flags) -> Request:
  """Trains the stages of --llava; returns a request for the last stage's run.

  `request` selects the encoder that they train on.
  """
  if args.evals != "vqa" or not args.output:
    raise ConfigError(
      "--llava trains a language model for --evals=vqa, in the folder --output."
      " Set both, and no other evaluation"
    )
  path, weights = request.path, request.weights
  root = f"{args.output}/llava/{file_name(request.name)}"
  # A run depends on the encoder's checkpoint and on all stages so far.
  inputs = [store.describe_encoder(path, weights, "")]
  for i, stage in enumerate(args.llava, 1):
    inputs.append(stage)
    digest, *_ = gather_json(examples.hash_rows([inputs])[:8])
    folder = f"{root}/{i}-{digest}"
    # Last, so that these override the stage's arguments.
    config = f"llava:{stage},encoder={path},weights={weights}"
    flags = [f"--workdir={folder}", f"--config={config}"]
    if status := run_command("train", flags):
      raise SystemExit(status)
    path, weights = folder, loading.default_weights(folder)
  return request._replace(path=path, weights=weights)


def stored_encoders(
  requests: Sequence[Request], output: str, dtype: str
) -> dict[str, suite.StoredEncoder]:
  """Returns encoders by name, with their folders of stored results.

  Checks paths and folders; loads nothing.
  """
  folders, encoders = set(), {}
  for request in requests:
    folder, weights = file_name(request.name), request.weights
    while folder in folders:  # "a/b" and "a:b" collide.
      folder += "-"
    folders.add(folder)
    arguments.check_writable(output, store.FOLDER, folder)
    options = dict(weights=weights, dtype=dtype)
    encoders[request.name] = suite.StoredEncoder(
      functools.partial(mtv_jax.load, request.path, **options),
      store.ResultStore(
        pathlib.Path(output, store.FOLDER, folder),
        store.describe_encoder(request.path, weights, dtype),
      ),
    )
  return encoders


def open_features(args: Evaluations) -> FeatureFolder | None:
  """Opens the folder of --features; default: in --output, or None."""
  path = args.features or (args.output and f"{args.output}/features")
  if not path or path == "none":
    return None
  fix = "Name a folder on a disk; several hosts need a shared one."
  path_lib.refuse_remote(path, "--features", fix)
  arguments.check_writable(path, flag="features")
  return FeatureFolder(pathlib.Path(path), args.features_gb * 10**9)
