"""Model card of an exported folder."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtv_jax.convert import origin as origin_lib
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils.errors import InputError

_TWO_TOWERS = """\
```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
inputs = processor(
  images=[Image.open("photo.jpg")],
  text=["a photo of a cat", "a photo of a dog"],
  padding="max_length",
  truncation=True,
{patches}  return_tensors="pt",
)
with torch.no_grad():
  logits = model(**inputs).logits_per_image
```

`padding="max_length"` is needed: the model was trained on texts padded to
{length} tokens.
"""
# `Siglip2Processor` replaces the settings of its image processor.
_PATCHES = """\
  max_num_patches={},
  patch_size={},
"""
_IMAGES = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, {loader}

model = {loader}.from_pretrained(".")
processor = AutoImageProcessor.from_pretrained(".")
inputs = processor(images=[Image.open("photo.jpg")], return_tensors="pt")
with torch.no_grad():
  outputs = model(**inputs)
{embedding}
```
"""
_POOLER = """\
embedding, patches = outputs.pooler_output, outputs.last_hidden_state"""
_PROJECTED = """\
embedding, patches = outputs.image_embeds, outputs.last_hidden_state"""
# Classes without a head don't return `pooler_output`.
_MEAN = """\
patches = outputs.last_hidden_state{prefix}
embedding = patches.mean(dim=1)"""
_NATIVE_MEAN = """\
patches = outputs.last_hidden_state
valid = inputs["pixel_attention_mask"][..., None]
embedding = (patches * valid).sum(dim=1) / valid.sum(dim=1)"""
_TIMM = """\
```python
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)
image = Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
  embedding = model(transform(image)[None])
```
"""
_PIL = """
With torchvision installed, transformers resizes with it, which rounds a few
pixels differently; `backend="pil"` of `from_pretrained` gives the same pixels
as mtv_jax.
"""
# Not in the card of a model that the code loads from the hub.
_RUN_NOTE = "Run the code in this folder, beside a `photo.jpg`.\n\n"
_TEMPLATE = """\
---
library_name: {library}
pipeline_tag: {task}
---

# A vision encoder trained with mtv_jax

ViT of width {width} and depth {depth}, patches of {patch} pixels, images of
{size} x {size} pixels, pooled by {pooled}; in {library} a `{class_name}`.

{here}## With {library}

{usage}
## With mtv_jax

```python
import mtv_jax
from PIL import Image

encoder = mtv_jax.load(".")
features = encoder.image([Image.open("photo.jpg")])  # pooled and patches
```
{heads}"""

# Marks the part that `complete_card` writes, with the model's name.
_COMPLETED = "<!-- mtv-jax push: {} -->"
_MARK = re.compile(re.escape(_COMPLETED).replace(r"\{\}", r"(\S+)"))
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_REPO = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)

_POOLED = {
  "map": "attention",
  "query": "attention",
  "cls": "its CLS token",
  "mean": "the mean of its patches",
}


def is_repo(name: str) -> bool:
  """Whether a name is a valid `ORG/NAME` on the hub."""
  return bool(_REPO.fullmatch(name)) and not re.search(r"--|\.\.", name)


def write_card(
  spec: ModelSpec,
  others: Sequence[str],
  *,
  class_name: str,
  preprocess: Mapping[str, Any],
) -> str:
  """Returns a short README with code that runs transformers' `class_name`.

  `others` are the parameters in `heads.safetensors`, `preprocess` the fields of
  `Preprocess`.
  """
  is_pillow = preprocess.get("rounding", "pillow") == "pillow"
  max_patches = preprocess.get("max_patches")  # For native aspect ratios.
  embedding = _POOLER
  if spec.image.pool == "mean":
    prefix = f"[:, {spec.image.prefix}:]" if spec.image.prefix else ""
    embedding = _NATIVE_MEAN if max_patches else _MEAN.format(prefix=prefix)
  task, library = "image-feature-extraction", "transformers"
  loader = "AutoModel"
  if class_name.endswith("WithProjection"):
    loader, embedding = class_name, _PROJECTED
  if "For" in class_name:
    loader, embedding = class_name, "depth = outputs.predicted_depth"
  usage = _IMAGES.format(embedding=embedding, loader=loader)
  if class_name.startswith("vit_pe"):
    library, usage = "timm", _TIMM
  if spec.text is not None:
    task = "zero-shot-image-classification"
    patches = max_patches and _PATCHES.format(
      max_patches, spec.image.patch_size
    )
    usage = _TWO_TOWERS.format(length=spec.text.length, patches=patches or "")
  if library == "transformers" and is_pillow:
    usage += _PIL
  heads = ", ".join(
    sorted({n.split("/")[1] for n in others if n.startswith("heads/")})
  )
  note = "\n`heads.safetensors` has parameters that only mtv_jax reads"
  note += f": the heads of {heads}.\n" if heads else ".\n"
  return _TEMPLATE.format(
    here=_RUN_NOTE,
    library=library,
    task=task,
    width=spec.image.width,
    depth=spec.image.depth,
    patch=spec.image.patch_size,
    size=preprocess["size"] + preprocess.get("drop", 0),
    class_name=class_name,
    pooled=_POOLED[spec.image.pool],
    usage=usage,
    heads=note if others else "",
  )


def complete_card(
  readme: str,
  *,
  repo: str,
  licence: str,
  data: str,
  licence_name: str | None = None,
  licence_link: str | None = None,
  base_model: str | None = None,
  origin: str = "",
  results: str = "",
) -> str:
  """Completes a folder's README to a hub model card.

  `readme` is the output of `write_card` or of an earlier call. The code is
  changed to load `repo` (ORG/NAME) from the hub. The metadata keep their tags
  and get the licence (a hub identifier, or `other` with a name and a link) and
  the base model. `data`, `origin` (of the weights) and `results`
  are Markdown.
  """
  origin_lib.check_licence(licence)
  if licence_name and not _LICENCE.fullmatch(licence_name):
    raise InputError(
      f"--license_name={licence_name!r}: expected lower-case letters, digits, "
      "'.' and '-'."
    )
  if (licence_name or licence_link) and licence != "other":
    raise InputError(f"A name or link needs licence 'other', not {licence!r}.")
  match = re.match(r"---\n((?:.*\n)*?)---\n((?s:.*))", readme)
  if match is None:
    raise InputError(
      "README.md does not begin with metadata between lines '---': write the "
      "folder again with `mtv-jax convert to_hf`."
    )
  metadata, body = match.groups()
  body = body.replace(_RUN_NOTE, "")
  keys = "license|license_name|license_link|base_model"
  # Includes the lines of a list or an indented value.
  metadata = re.sub(rf"(?m)^({keys}):.*\n([ -].*\n)*", "", metadata)
  if not re.search(r"(?m)^tags:", metadata):
    metadata += "tags: [mtv_jax]\n"
  metadata += f"license: {licence}\n"
  if licence_name:
    metadata += f"license_name: {licence_name}\n"
  if licence_link:
    metadata += f"license_link: {json.dumps(licence_link)}\n"
  if base_model and is_repo(base_model):
    metadata += f"base_model: {base_model}\n"
  mark = _MARK.search(body)
  load_arguments = [r'"\."', "folder"]  # Earlier versions wrote `folder`.
  if mark:
    body = body[: mark.start()]
    load_arguments.append(re.escape(f'"{mark[1]}"'))
  body = re.sub(
    rf"(from_pretrained|load)\(({'|'.join(load_arguments)})\)",
    rf'\1("{repo}")',
    body,
  )
  licence_parts = (licence_name or licence, licence_link)
  body = body.replace('"local-dir:."', f'"hf-hub:{repo}"')
  parts = [
    f"---\n{metadata}---\n{body.rstrip()}\n\n{_COMPLETED.format(repo)}",
    f"## Training data\n\n{data}",
    f"## Base model\n\n{origin or base_model or 'Not recorded.'}",
    f"## Results\n\n{results or 'No evaluation was recorded.'}",
    f"## Licence\n\n{' '.join(filter(None, licence_parts))}",
  ]
  return "\n\n".join(parts) + "\n"
