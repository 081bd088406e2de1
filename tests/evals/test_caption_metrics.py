"""BLEU and CIDEr against pycocoevalcap 1.2, and its tokenizer's splits."""

import numpy as np
import pytest

from mtv_jax.evals import captioning as caption_metrics

REFERENCES = (
  ("A dog runs on the grass.", "The brown dog is running", "a dog, outside"),
  ("A man's red kite in the sky", "A kite that a man flies"),
  ("Two cats sleep on a bed.", "Cats on the bed", "two cats asleep on a bed"),
)
# Figures of pycocoevalcap on its own tokens of these texts.
BLEU = {
  "bleu1": 0.6717807103579927,
  "bleu2": 0.6110150152498071,
  "bleu3": 0.5532838213459151,
  "bleu4": 0.48158230966807386,
}
CIDER = [3.1614020920145043, 2.978913752948727, 0.46400475095868887]
ANSWERS = ("a dog runs on the bed", "a man flies a kite", "two dogs")


def tokens():
  tokenize = caption_metrics.tokenize
  references = [[tokenize(text) for text in own] for own in REFERENCES]
  return [tokenize(text) for text in ANSWERS], references


def test_figures_of_pycocoevalcap():
  statistics = caption_metrics.bleu_statistics(*tokens())
  got = caption_metrics.bleu(statistics.sum(axis=0))
  assert got == pytest.approx(BLEU, abs=1e-12)
  np.testing.assert_allclose(caption_metrics.cider(*tokens()), CIDER)


@pytest.mark.parametrize(
  "text, want",
  [
    ("It's a boy's (small) T-shirt, isn't it?", "it 's a boy 's -lrb- small "
     "-rrb- t-shirt is n't it"),
    ("Mr. Smith cannot pay $1,000.50 at 3:30 p.m.", "mr. smith can not pay $ "
     "1,000.50 at 3:30 p.m."),
    ("\u201cNo.\u201d \u2013 said no. 5; up/down & wow!! ...", "no said no. 5 "
     "up/down & wow !!"),
  ],
)  # fmt: skip
def test_tokens_are_stanfords(text, want):
  assert caption_metrics.tokenize(text) == want.split()
