"""Converts models: to Hugging Face, from Hugging Face, from big_vision.

    python tools/convert.py to_hf RUN OUT --weights=ema
    python tools/convert.py from_hf FOLDER OUT --image_size=256
    python tools/convert.py from_big_vision A.npz OUT --tokenizer=B.model

`to_hf` takes a run, an export or a folder that the other two wrote, and writes
a folder that AutoModel and AutoProcessor of transformers open. The other two
write a folder that mtv_jax.load and a config's `init` open. No PyTorch.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mtv_jax.convert import big_vision, huggingface
from mtv_jax.convert.converted import Converted
from mtv_jax.convert.processors import TokenizerFiles
from mtv_jax.encoder import loading
from mtv_jax.train.metrics import setup_logging

_COMMANDS = {
  "to_hf": "a run, an export or an imported folder to Hugging Face",
  "from_hf": "a SigLIP, CLIP or DINOv2 folder of Hugging Face to ours",
  "from_big_vision": "a SigLIP .npz of big_vision to ours",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, text in _COMMANDS.items():
    command = commands.add_parser(name, help=text)
    command.add_argument("source", help="what to convert")
    command.add_argument("out", help="a new or empty folder")
    command.add_argument(
      "--image_size",
      type=int,
      help="resample the position embedding for images of this size in pixels",
    )
    command.add_argument(
      "--tokenizer",
      help="a SentencePiece model, a tokenizer.json or 'bytes'; by default the "
      "source's own",
    )
    command.add_argument(
      "--clean",
      default="canonicalize",
      choices=["none", "lower", "canonicalize"],
      help="what is done to texts before --tokenizer (default: %(default)s)",
    )
    if name == "to_hf":
      command.add_argument(
        "--weights",
        default="student",
        choices=["student", "teacher", "ema"],
        help="which weights of a run (default: %(default)s)",
      )
      command.add_argument(
        "--step", type=int, help="which checkpoint of a run (default: latest)"
      )
  return parser.parse_args(argv)


def source_of(arguments: argparse.Namespace) -> Converted:
  """Reads the source."""
  if arguments.command == "from_big_vision":
    return big_vision.read(arguments.source)
  if arguments.command == "to_hf" and loading.is_run(arguments.source):
    return loading.read_run(
      arguments.source, weights=arguments.weights, step=arguments.step
    )
  return huggingface.read(arguments.source)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; errors end the program with their message."""
  setup_logging()
  arguments = parse(argv)
  try:
    if Path(arguments.source).resolve() == Path(arguments.out).resolve():
      raise ValueError(
        f"{arguments.out} is the source itself: name another folder to write."
      )
    model = source_of(arguments)
    if arguments.tokenizer:
      path = arguments.tokenizer
      files = TokenizerFiles(
        None if path == "bytes" else Path(path), arguments.clean
      )
      model = dataclasses.replace(model, tokenizer=files)
    if arguments.image_size:
      model = model.resized(arguments.image_size)
    write = huggingface.write_native
    if arguments.command == "to_hf":
      write = huggingface.write
    folder = write(
      arguments.out,
      model.spec,
      model.params,
      preprocess=model.preprocess,
      tokenizer=model.tokenizer,
      prediction_heads=model.prediction_heads,
    )
  except (ValueError, OSError) as error:
    raise SystemExit(f"{arguments.command}: {error}") from error
  print(f"Wrote {folder}: {sorted(p.name for p in folder.iterdir())}")


if __name__ == "__main__":
  main()
