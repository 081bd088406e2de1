"""Converts models to Hugging Face, ONNX and StableHLO, and from other formats.

    mtv-jax convert to_hf RUN OUT --weights=ema
    mtv-jax convert to_peft RUN OUT
    mtv-jax convert to_onnx RUN OUT --batch=8
    mtv-jax convert to_open_clip RUN OUT
    mtv-jax convert to_stablehlo RUN OUT
    mtv-jax convert from_hf FOLDER OUT --image_size=256
    mtv-jax convert from_big_vision A.npz OUT --tokenizer=B.model

`to_hf` converts a run, an export or an imported folder to a folder for
transformers' AutoModel and AutoProcessor, `to_peft` only the adapters of a run
with `config.lora`. `to_onnx` is `to_hf` with a model.onnx, `to_open_clip`
writes a folder for open_clip. `from_hf` and `from_big_vision` write a folder
for mtv_jax.load and a config's `init`; `to_stablehlo` adds functions for
jax.export to it. Only `to_onnx` needs PyTorch.
"""

import argparse
import dataclasses
import pathlib

from mtv_jax.convert import big_vision, huggingface, native, onnx, peft
from mtv_jax.convert.model import ConvertedModel
from mtv_jax.data.tokenizers.source import TokenizerSource
from mtv_jax.encoder import loading, stablehlo
from mtv_jax.train.metrics import setup_logging
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError

_COMMANDS = {
  "to_hf": "a run, an export or an imported folder to Hugging Face",
  "to_peft": "only the LoRA adapters of a run to PEFT's files",
  "to_onnx": "to Hugging Face; the image tower and depth head also to ONNX",
  "to_open_clip": "a run, an export or an imported folder to open_clip",
  "to_stablehlo": "a model from any folder to StableHLO, for jax.export",
  "from_hf": "a Hugging Face folder (docs/conversion.md) to ours",
  "from_big_vision": "a SigLIP .npz of big_vision to ours",
}
_BATCH_WRITERS = {"to_onnx": onnx.write, "to_stablehlo": stablehlo.write}

_WRITERS = {
  "to_hf": huggingface.write,
  "to_open_clip": huggingface.write_open_clip,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of `mtv-jax convert`."""
  commands = parser.add_subparsers(dest="command", required=True)
  for name, text in _COMMANDS.items():
    add = commands.add_parser(name, help=text).add_argument
    add("source", help="the model to convert")
    add("output", help="a new or empty folder")
    text = "resample the position embedding for images of this size in pixels"
    add("--image_size", type=int, help=text)
    text = (
      "SentencePiece model, tokenizer.json, ORG/NAME of the hub, 'bytes' or "
      "'words'; default: the source's"
    )
    add("--tokenizer", help=text)
    choices = ("canonicalize", "lower", "none", "clip")
    text = "cleaning of texts before --tokenizer (default: %(default)s)"
    add("--clean", default=choices[0], choices=choices, help=text)
    if name in _BATCH_WRITERS:
      text = "fix the batch size (default: any)"
      add("--batch", type=int, help=text)
    if name.startswith("to_"):
      choices = ("student", "teacher", "ema")
      text = "which weights of a run (default: its config.weights)"
      add("--weights", choices=choices, help=text)
      text = "which checkpoint of a run (default: latest)"
      add("--step", type=int, help=text)


def run(args: argparse.Namespace) -> None:
  """Converts the model and prints the files written."""
  setup_logging()
  if path_lib.is_same(args.source, args.output):
    raise InputError(
      f"{args.output} is the source: name another output folder."
    )
  if getattr(args, "batch", None) is not None and args.batch < 1:
    raise InputError(f"--batch={args.batch}: expected at least 1.")
  if args.command == "to_peft":
    if args.image_size or args.tokenizer:
      names = "--image_size and --tokenizer"
      raise InputError(f"to_peft writes only adapters: leave out {names}.")
    folder = write_adapters(args)
    print(f"Wrote {folder}: {path_lib.list_folder(folder)}")
    return
  model = read_source(args)
  if args.tokenizer:
    files = TokenizerSource(args.tokenizer, args.clean).find_files()
    model = dataclasses.replace(model, tokenizer=files)
  if args.image_size:
    model = model.resize(args.image_size)
  if write := _BATCH_WRITERS.get(args.command):
    folder = write(args.output, model, batch=args.batch)
  else:
    folder = _WRITERS.get(args.command, native.write)(args.output, model)
  print(f"Wrote {folder}: {path_lib.list_folder(folder)}")


def write_adapters(args: argparse.Namespace) -> pathlib.PurePath:
  """Writes a run's LoRA adapters, for the model that it started from."""
  model, lora, source = loading.read_adapters(
    args.source, weights=args.weights, step=args.step
  )
  base, name, revision = loading.open_folder(source), source, None
  if hub.is_name(source):
    pinned = loading.pin_name(source).removeprefix(hub.PREFIX)
    name, _, revision = pinned.partition("@")
  return peft.write(
    args.output, model, lora=lora, base=base, name=name, revision=revision
  )


def read_source(args: argparse.Namespace) -> ConvertedModel:
  """Reads the model to convert."""
  if args.command == "from_big_vision":
    return big_vision.read(path_lib.local_copy(args.source))
  folder = loading.open_folder(args.source)
  if args.command.startswith("to_") and loading.is_run(folder):
    return loading.read_run(folder, weights=args.weights, step=args.step)
  return huggingface.read(folder)
