"""Writes ImageNet's class names and prompt templates to a JSON file.

    mtv-jax make_prompts --output=imagenet.json

The strings come from the installed open_clip, as in published zero-shot
figures.
"""

from mtv_jax.evals.core import prompts


def run(output: str) -> None:
  """Writes the file.

  Args:
    output: the file to write.
  """
  imagenet = prompts.imagenet_prompts()
  prompts.write_prompts(output, imagenet)
  print(
    f"{output}: {len(imagenet.classes)} classes, "
    f"{len(imagenet.templates)} templates"
  )
