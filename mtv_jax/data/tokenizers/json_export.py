"""Parts of an exported `tokenizer.json`: cleaning and special tokens.

Cleaning becomes normalizers in front of the tokenizer's own, so that the
exported folder gives the same ids from raw text without this package.
"""

import re
import string

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors


def cleaning_normalizers(clean: str) -> list[normalizers.Normalizer]:
  """The cleaning of `Tokenizer.cleaned` as normalizers."""
  if clean == "none":
    return []
  if clean == "lower":
    return [normalizers.Lowercase()]
  return [
    normalizers.Replace("_", " "),
    normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Strip(),
  ]


def special_token(name: str) -> AddedToken:
  """A token that cleaning leaves as it is."""
  return AddedToken(name, special=True, normalized=False)


def append_eos(tokenizer: Tokenizer, eos: str, eos_id: int) -> None:
  """Ends every text with the end-of-sequence token."""
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"$A {eos}",
    pair=f"$A {eos} $B {eos}",
    special_tokens=[(eos, eos_id)],
  )
