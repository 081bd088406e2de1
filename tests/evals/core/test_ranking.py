"""Ranks: ties, duplicates, blocks, and the libraries that know the answers."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mtv_jax.evals.core import ranking
from mtv_jax.evals.core.ranking import ranks, ranks_of_scores


def naive(scores, own):
  """Stable sort of each row; index of the first correct candidate."""
  out = []
  for row, mine in zip(scores, own, strict=True):
    order = np.argsort(-row, kind="stable")
    out.append(int(np.flatnonzero(mine[order])[0]))
  return out


def integers(rng, rows, width=4):
  """Embeddings whose dot products are exact, so that ties are real."""
  return rng.integers(-1, 2, (rows, width)).astype(np.float32)


def test_a_tie_goes_to_the_lowest_index():
  scores = np.array([[1.0, 3.0, 3.0, 3.0]] * 4)
  assert list(ranks_of_scores(scores, np.eye(4, dtype=bool))) == [3, 0, 1, 2]
  # The best of several own candidates.
  scores = np.array([[0.2, 0.9, 0.5, 0.9]] * 2)
  own = np.array([[True, False, False, True], [True, False, True, False]])
  assert list(ranks_of_scores(scores, own)) == [1, 2]


@pytest.mark.parametrize("block_bytes", [1, 4 * 37 * 5, 2**26])
def test_blocks_equal_the_whole_with_ties(block_bytes):
  rng = np.random.default_rng(0)
  queries, candidates = integers(rng, 23), integers(rng, 37)
  query_ids = rng.integers(0, 8, 23)
  candidate_ids = np.concatenate([np.arange(8), rng.integers(0, 8, 29)])
  scores = queries @ candidates.T
  assert len(np.unique(scores)) < 12
  got = ranks(
    queries,
    candidates,
    query_ids=query_ids,
    candidate_ids=candidate_ids,
    block_bytes=block_bytes,
  )
  want = naive(scores, query_ids[:, None] == candidate_ids[None])
  assert list(got) == want
  assert len(set(want)) > 3


def test_duplicates_tie_to_the_last_bit():
  """Equal candidates wherever they stand in the matrix product."""
  rng = np.random.default_rng(1)
  base = rng.normal(size=(5, 33)).astype(np.float32)
  candidates = np.concatenate([base, rng.normal(size=(40, 33)), base])
  candidates = candidates.astype(np.float32)
  # The second copy is correct for each query: only the first one is ahead of
  # it, by the tie rule.
  ids = np.arange(50)
  first = ranks(base, candidates, query_ids=ids[:5], candidate_ids=ids)
  second = ranks(base, candidates, query_ids=ids[45:], candidate_ids=ids)
  np.testing.assert_array_equal(second, first + 1)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_distinct_rows_against_a_dictionary(width):
  """Signs, zeros of both signs and whole numbers, whose low bits are equal."""
  rng = np.random.default_rng(3)
  rows = rng.integers(-1, 2, (700, width)).astype(np.float32)
  rows *= rng.choice(np.float32([1, -1]), rows.shape)
  rows = np.asfortranarray(rows)
  seen = {}
  want = [seen.setdefault(tuple(row), len(seen)) for row in rows.tolist()]
  unique, inverse = ranking._unique_rows(rows)
  assert list(inverse) == want
  assert [tuple(row) for row in unique.tolist()] == list(seen)
  assert len(seen) < 700


def test_mistakes_are_named():
  good, bad = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
  bad[1, 2] = np.nan
  for queries, candidates, ids, message in (
    (bad, good, [0, 1], "1 of 2 queries .*number 1"),
    (good, bad, [0, 1], "candidates are not finite"),
    (good, good, [0, 7], "1 query ids .* first is 7"),
  ):
    options = {"query_ids": np.array(ids), "candidate_ids": np.arange(2)}
    with pytest.raises(ValueError, match=message):
      ranks(queries, candidates, **options)


@pytest.mark.slow
def test_memory_is_that_of_a_block():
  """COCO's 5,000 images by 25,010 captions: 500 MB of scores, never whole."""
  code = """
    import resource
    import numpy as np
    from mtv_jax.evals.core import ranking

    def peak():
      return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    rng = np.random.default_rng(0)
    captions = rng.normal(size=(25_010, 64)).astype(np.float32)
    images = captions[::5][:5000] + np.float32(0.01)
    owner = np.minimum(np.arange(25_010) // 5, 4999)
    ids = np.arange(5000)
    ranking.ranks(images[:8], captions[:40], query_ids=ids[:8],
                  candidate_ids=owner[:40])
    before = peak()
    got_ranks = ranking.ranks(images, captions, query_ids=ids,
                              candidate_ids=owner, block_bytes=2**22)
    back = ranking.ranks(captions, images, query_ids=owner, candidate_ids=ids,
                         block_bytes=2**22)
    print(peak() - before)
    assert (got_ranks == 0).all()
    assert (back[::5][:5000] == 0).all()
  """
  out = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    capture_output=True,
    text=True,
    check=True,
  )
  # A block is 4 MB; its scores, copies and masks are in memory at once.
  assert float(out.stdout) < 200


@pytest.mark.reference
def test_hit_rates_are_those_of_torchmetrics():
  pytest.importorskip("torchmetrics")
  import torch
  from torchmetrics.functional.retrieval import retrieval_hit_rate

  rng = np.random.default_rng(2)
  scores = rng.permutation(40 * 30).reshape(40, 30).astype(np.float32) - 600
  own = rng.random((40, 30)) < 0.1
  own[np.arange(40), rng.integers(0, 30, 40)] = True
  got_ranks = np.asarray(ranks_of_scores(scores, own))
  for k in (1, 5, 10):
    want = [
      retrieval_hit_rate(torch.tensor(s), torch.tensor(o), top_k=k).item()
      for s, o in zip(scores, own, strict=True)
    ]
    got = np.mean(got_ranks < k)
    assert got == pytest.approx(np.mean(want), abs=1e-6)
    assert 0 < got < 1
