"""OWLv2 against `transformers`, on real photos."""

import gzip
import json

import jax
import numpy as np
import pytest
from labelling_samples import mesh_of

from mtv_jax.data import canvas
from mtv_jax.experts import owlv2, owlv2_model
from mtv_jax.experts.labelling.phrases import Tags
from mtv_jax.experts.owlv2_model import Owlv2

pytestmark = pytest.mark.reference


def tower(width, depth, heads, **options):
  return dict(
    hidden_size=width,
    intermediate_size=2 * width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    **options,
  )


SMALL = dict(
  text_config=tower(64, 3, 4),
  vision_config=tower(96, 4, 6, image_size=160, patch_size=16),
  projection_dim=64,
)
PHRASES = ("a dog", "person", "the red car on the street", "tree", "traffic")


@pytest.fixture(scope="module")
def vocabulary(shared_data, tmp_path_factory):
  """CLIP's `vocab.json` and `merges.txt`, from the merges that OpenAI gave."""
  file = shared_data / "tokenizers" / "bpe_simple_vocab_16e6.txt.gz"
  lines = gzip.decompress(file.read_bytes()).decode().split("\n")
  merges = lines[1 : 49152 - 256 - 2 + 1]
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  letters = [chr(b) for b in printable]
  letters += [chr(256 + i) for i in range(len(others))]
  tokens = letters + [letter + "</w>" for letter in letters]
  tokens += ["".join(merge.split()) for merge in merges]
  tokens += ["<|startoftext|>", "<|endoftext|>"]
  path = tmp_path_factory.mktemp("clip")
  table = {token: i for i, token in enumerate(tokens)}
  (path / "vocab.json").write_text(json.dumps(table))
  (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  return path


def make(config, vocabulary, path):
  """A random model of transformers, saved with a tokenizer."""
  torch = pytest.importorskip("torch")
  from transformers import Owlv2Config, Owlv2ForObjectDetection

  torch.manual_seed(0)
  model = Owlv2ForObjectDetection(Owlv2Config(**config)).eval()
  with torch.no_grad():
    # The default initialisation makes each box the whole image or empty.
    for head in (model.box_head, model.objectness_head, model.class_head):
      for parameter in head.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
  model.save_pretrained(path)
  for file in vocabulary.iterdir():
    (path / file.name).write_bytes(file.read_bytes())
  return model


def photos(shared_data):
  """A wide, a tall and the most square one."""
  files = sorted((shared_data / "coco").rglob("*.jpg"))[:60]
  images = [canvas.decode(file.read_bytes()) for file in files]
  images.sort(key=lambda image: image.shape[0] / image.shape[1])
  ratios = [abs(np.log(i.shape[0] / i.shape[1])) for i in images]
  return [images[0], images[-1], images[int(np.argmin(ratios))]]


def compare(model, folder, images, *, size=None):
  """Raw outputs and detections of both, on our pixels."""
  import torch
  from transformers import Owlv2ImageProcessor
  from transformers.modeling_outputs import ModelOutput

  expert = owlv2.load_expert(
    folder, phrases=Tags("tags"), mesh=mesh_of(1), threshold=0.2, size=size
  )
  files = owlv2_model.read(folder)
  module = Owlv2(files.spec)
  whole = jax.jit(lambda p, x, t: module.apply({"params": p}, x, t))
  for image in images:
    prepared = expert.prepare(image, {"key": "7", "meta": {"tags": PHRASES}})
    pixels = prepared.arrays["pixels"][None]
    tokens = prepared.arrays["tokens"]
    with torch.inference_mode():
      theirs = model(
        input_ids=torch.from_numpy(tokens[:, 0]).long(),
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        interpolate_pos_encoding=size is not None,
      )
    patches, logits = whole(files.params, pixels, tokens[None, :, 0])
    x, y, width, height = np.moveaxis(theirs.pred_boxes.numpy(), -1, 0)
    boxes = np.stack(
      [y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1
    )
    np.testing.assert_allclose(logits, theirs.logits, atol=1e-4)
    np.testing.assert_allclose(patches.boxes, boxes, atol=1e-4)
    objectness = theirs.objectness_logits
    np.testing.assert_allclose(patches.objectness, objectness, atol=1e-4)

    output = expert.run({k: v[None] for k, v in prepared.arrays.items()})
    output = {k: np.asarray(v)[0, ...] for k, v in output.items()}
    rank = min(100, len(output["scores"]) // 2)
    threshold = float(np.sort(output["scores"])[-rank])
    (expected,) = Owlv2ImageProcessor().post_process_object_detection(
      ModelOutput(logits=theirs.logits, pred_boxes=theirs.pred_boxes),
      threshold=threshold + 1e-6,
      target_sizes=[image.shape[:2]],
    )
    order = np.argsort(-expected["scores"].numpy(), kind="stable")
    count = len(order)
    assert 20 < count < 100
    np.testing.assert_allclose(
      output["scores"][:count], expected["scores"].numpy()[order], atol=1e-5
    )
    # Neighbours in rank may differ by rounding only: compares sets.
    scaled = output["boxes"][:count] * max(image.shape[:2])
    rows = np.column_stack([output["labels"][:count], scaled])
    wanted = np.column_stack(
      [expected["labels"].numpy(), expected["boxes"].numpy()[:, [1, 0, 3, 2]]]
    )
    for row in wanted:
      assert np.abs(rows - row).max(1).min() < 0.05
    outcome = expert.finish(output, prepared.meta)
    assert outcome.label is not None


def test_small_model(vocabulary, shared_data, tmp_path):
  model, images = make(SMALL, vocabulary, tmp_path), photos(shared_data)
  compare(model, tmp_path, images)
  # Resampled positions.
  compare(model, tmp_path, images[:1], size=112)


# At 448 pixels, as at 960, there are more patches than the expert returns.
@pytest.mark.slow
@pytest.mark.parametrize(
  ("size", "depth"), [(448, 3), pytest.param(960, 12, marks=pytest.mark.long)]
)
def test_base_model(vocabulary, shared_data, tmp_path, size, depth):
  blocks = dict(num_hidden_layers=depth)
  vision = dict(image_size=size, **blocks)
  config = dict(vision_config=vision, text_config=blocks)
  model = make(config, vocabulary, tmp_path)
  compare(model, tmp_path, photos(shared_data)[:1])


@pytest.mark.parametrize("size", [96, 960])
def test_pixels(shared_data, size):
  """As the processor that works as the authors do, on grey padding."""
  from transformers.models.owlv2.image_processing_pil_owlv2 import (
    Owlv2ImageProcessorPil,
  )

  processor = Owlv2ImageProcessorPil()
  for image in photos(shared_data):
    side = max(image.shape[:2])
    padded = np.full((side, side, 3), 0.5)
    padded[: image.shape[0], : image.shape[1]] = image / 255
    expected = processor.resize(
      padded.transpose(2, 0, 1), {"height": size, "width": size}
    ).transpose(1, 2, 0)
    ours = owlv2.pad_to_square(image, size)
    difference = np.abs(ours - expected)
    if size > side:
      # Outside of the centres of the outermost pixels.
      difference = difference[1:-1, 1:-1]
    print(size, image.shape, difference.max())
    assert difference.max() < 1e-5


def test_tokens(vocabulary, shared_data):
  from transformers import CLIPTokenizer

  file = shared_data / "coco" / "annotations" / "captions_val2017.json"
  captions = json.loads(file.read_text())["annotations"][:400]
  texts = [row["caption"] for row in captions]
  texts += ["", " ", "caf\u00e9 \u2603 don't", "x" * 90, "1999, <|endoftext|>"]
  theirs = CLIPTokenizer(
    str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")
  )(texts, padding="max_length", truncation=True, max_length=16)
  ours = owlv2_model.ClipTokenizer(vocabulary).encode(texts, 16)
  np.testing.assert_array_equal(ours, np.array(theirs["input_ids"]))
