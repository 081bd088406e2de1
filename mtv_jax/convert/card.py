"""Model card of an exported folder."""

from collections.abc import Sequence

from mtv_jax.models.two_tower import ModelSpec

_TWO_TOWERS = """\
```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(
  images=[Image.open("photo.jpg")],
  text=["a photo of a cat", "a photo of a dog"],
  padding="max_length",
  truncation=True,
  return_tensors="pt",
)
with torch.no_grad():
  logits = model(**inputs).logits_per_image
```

`padding="max_length"` is needed: the model was trained on texts padded to
{length} tokens.
"""
_IMAGES = """\
```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
inputs = processor(images=[Image.open("photo.jpg")], return_tensors="pt")
with torch.no_grad():
  outputs = model(**inputs)
embedding, patches = outputs.pooler_output, outputs.last_hidden_state
```
"""
_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: {task}
---

# A vision encoder trained with mtv_jax

ViT of width {width} and depth {depth}, patches of {patch} pixels, images of
{size} x {size} pixels, pooled by {pooled}.

## With transformers

{usage}
With torchvision installed, transformers resizes with it, which rounds a few
pixels differently; `backend="pil"` of `from_pretrained` gives the pixels that
mtv_jax gives.

## With mtv_jax

```python
import mtv_jax

encoder = mtv_jax.load(folder)
features = encoder.image([image])  # uint8 [H, W, 3]; pooled and patches
```
{heads}"""

_POOLED = {
  "map": "attention; the architecture of SigLIP",
  "cls": "its CLS token; the architecture of CLIP",
}


def write_card(spec: ModelSpec, others: Sequence[str]) -> str:
  """A short README with runnable code.

  Args:
    spec: the model's spec.
    others: names of the parameters in `heads.safetensors`.
  """
  task, usage = "image-feature-extraction", _IMAGES
  if spec.text is not None:
    task = "zero-shot-image-classification"
    usage = _TWO_TOWERS.format(length=spec.text.length)
  heads = ", ".join(
    sorted({n.split("/")[1] for n in others if n.startswith("heads/")})
  )
  note = "\n`heads.safetensors` has parameters that only mtv_jax reads"
  note += f": the heads of {heads}.\n" if heads else ".\n"
  return _TEMPLATE.format(
    task=task,
    width=spec.image.width,
    depth=spec.image.depth,
    patch=spec.image.patch_size,
    size=spec.image.image_size,
    pooled=_POOLED[spec.image.pool],
    usage=usage,
    heads=note if others else "",
  )
