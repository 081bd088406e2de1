"""Model card, licence and upload of an exported folder."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtv_jax.config.origin import Origin
from mtv_jax.models.two_tower import ModelSpec
from mtv_jax.utils import hub
from mtv_jax.utils import path as path_lib
from mtv_jax.utils.errors import InputError, did_you_mean, printable

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
# https://huggingface.co/docs/hub/repositories-licenses
_HUB_LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m
bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd
bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""
LICENCES = frozenset(_HUB_LICENCES.split())
# Licences that permit another one for derived weights.
_PERMISSIVE = re.compile(
  r"apache-2\.0|mit|bsd.*|isc|cc0-1\.0|cc-by-\d\.\d|cdla-permissive-.*|"
  r"unlicense|wtfpl|zlib|ncsa|postgresql|pddl|openmdw-.*|afl-3\.0|bsl-1\.0"
)
# `license: mit`, or the first of a list on this line or the next.
_README_LICENCE = re.compile(
  r"^['\"]?license['\"]?[ \t]*:[ \t]*(?:#.*)?(?:\n[ \t]*-[ \t]*|\[[ \t]*)?"
  r"['\"]?([\w.+-]+)",
  re.MULTILINE,
)

_POOLED = {
  "map": "attention",
  "query": "attention",
  "cls": "its CLS token",
  "mean": "the mean of its patches",
}


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
  check_licence(licence)
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
  if base_model and hub.is_repo(base_model):
    metadata += f"base_model: {base_model}\n"
  load_arguments = [r'"\."']
  if mark := _MARK.search(body):
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


def describe_base(origin: Origin, name: str | None = None) -> str:
  """Markdown of the base model, teachers and label experts.

  `name` is the base's, if it was read from a local folder.
  """
  base, methods = origin.base, [n.training for n in origin.chain if n.training]
  text = "None: trained from random weights."
  if base is not None:
    text = describe_origin(dataclasses.replace(base, name=name or base.name))
    history = "converted without training"
    if methods:
      history = "continued with LoRA" if "lora" in methods else "continued"
    text += f", {history}."
  lines = [f"- {role}: {describe_origin(x)}" for role, x in origin.sources]
  lines = [*dict.fromkeys(lines)]
  return "\n".join([text, "", "Learnt from:", "", *lines] if lines else [text])


def describe_origin(origin: Origin) -> str:
  """Name, revision and licence."""
  revision = f", revision {origin.revision}" if origin.revision else ""
  licence = origin.licence or "not recorded"
  return f"{origin.name or 'unnamed'}{revision} (licence: {licence})"


def check_licence(licence: str, origin: Origin | None = None) -> None:
  """Raises InputError for a licence that the hub or a base does not allow.

  A model keeps the licence of the models it continues, unless that is
  permissive; `other` stands for a licence that the hub does not list.
  """
  if licence not in LICENCES:
    raise InputError(
      f"The licence {licence!r} is not an identifier of the hub. "
      f"{did_you_mean(licence, LICENCES)} Use 'other' for any other licence."
    )
  for node in origin.chain if origin else ():
    parent_licence = node.licence or "unknown"
    required_licence = parent_licence if parent_licence in LICENCES else "other"
    is_permissive = _PERMISSIVE.fullmatch(parent_licence)
    if required_licence not in ("unknown", licence) and not is_permissive:
      raise InputError(
        f"{node.name}, which this model comes from, has the licence "
        f"{parent_licence}, which {licence} does not keep: pass "
        f"--license={required_licence}."
      )


def name_folder(path: pathlib.PurePath, origin: Origin | None = None) -> Origin:
  """The origin of a folder or file, with its name, revision and licence.

  A snapshot in the hub's cache is named after its repository.
  """
  fields: dict[str, Any] = {"name": path.name, "licence": _read_licence(path)}
  repo = re.fullmatch(r"models--(.+?)--(.+)", "".join(path.parts[-3:-2]))
  if repo and path.parts[-2] == "snapshots":
    fields |= dict(name="/".join(repo.groups()), revision=path.name)
  return dataclasses.replace(origin or Origin(), **fields)


def _read_licence(folder: pathlib.PurePath) -> str | None:
  """The licence in a folder's README; the first if several."""
  readme = folder / "README.md"
  if not path_lib.is_file(readme):
    return None
  data = path_lib.read_regular(readme, limit=path_lib.MAX_JSON)
  text = "\n".join(data.decode("utf-8", errors="replace").splitlines())
  front_matter = re.match(r"\ufeff?\s*---[ \t]*\n(.*?)\n---", text, re.DOTALL)
  match = front_matter and _README_LICENCE.search(front_matter[1])
  return match[1].lower() if match else None


def upload(
  folder: pathlib.Path,
  repo: str,
  *,
  private: bool = False,
  revision: str | None = None,
) -> str:
  """Uploads to a hub model, created if missing; returns the commit's URL."""
  client, api = hub.import_hub(), hub.open_api()
  options = dict(revision=revision, commit_message="Upload with mtv_jax")
  try:
    api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo, folder_path=folder, **options)
  except hub.error_types(client) as error:
    reason = printable(" ".join(str(error).split())).rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    hint = (
      " Log in with `hf auth login`, or set HF_TOKEN to a token that can write."
      if status in (401, 403)
      else ""
    )
    raise InputError(
      f"{folder} can't be uploaded to {repo}: {reason}.{hint}"
    ) from error
  return str(commit.commit_url)
