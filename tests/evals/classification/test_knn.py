"""k-NN: ties, blocks, devices, scikit-learn, and memory that stays bounded."""

import numpy as np
import pytest

from mtv_jax.encoder.features import normalize
from mtv_jax.evals.classification import knn
from mtv_jax.evals.classification.probe_evaluators import majority_accuracy
from mtv_jax.evals.core.examples import ClassificationSet, Splits, open_items
from mtv_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def mesh():
  return make_mesh({"data": -1})


def naive(queries, bank, k):
  """A stable sort of each row: of equal rows the first."""
  order = np.argsort(-(queries @ bank.T), axis=1, kind="stable")
  return order[:, :k]


@pytest.mark.parametrize("block_bytes", [4 * 4 * 5, 4 * 37 * 3, 2**20])
def test_search_in_blocks_equals_a_stable_sort(mesh, block_bytes):
  rng = np.random.default_rng(0)
  # Dot products of small integers are exact, so ties are exact.
  queries = rng.integers(-1, 2, (23, 4)).astype(np.float32)
  bank = rng.integers(-1, 2, (37, 4)).astype(np.float32)
  got = knn.find_neighbours(
    queries, bank, k=11, mesh=mesh, block_bytes=block_bytes
  )
  want = naive(queries, bank, 11)
  np.testing.assert_array_equal(got.index, want)
  scores = queries @ bank.T
  assert len(np.unique(scores)) < 12
  np.testing.assert_array_equal(
    got.similarity, np.take_along_axis(scores, want, axis=1)
  )


def test_one_device_and_eight_agree(mesh):
  rng = np.random.default_rng(1)
  queries, bank = (
    normalize(rng.normal(size=(n, 16)).astype(np.float32)) for n in (13, 60)
  )
  eight = knn.find_neighbours(queries, bank, k=5, mesh=mesh)
  one = knn.find_neighbours(queries, bank, k=5)
  np.testing.assert_array_equal(one.index, eight.index)
  np.testing.assert_allclose(one.similarity, eight.similarity, atol=1e-6)


def test_predict_golden():
  """Weights e^0, e^-1, e^-2, ... of classes 1, 0, 0, 2, 0, ... by hand."""
  similarity = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]], np.float32)
  neighbours = knn.Neighbours(similarity, np.array([[4, 3, 0, 1, 2]]))
  labels = np.array([0, 2, 0, 0, 1], np.int32)

  def predict(temperature):
    options = dict(ks=(1, 3, 5), classes=3, temperature=temperature)
    got = knn.predict(neighbours, labels, **options)
    return {k: int(p[0]) for k, p in got.items()}

  # 1 against e^-1 + e^-2 (+ e^-4) = 0.50 (0.52).
  assert predict(0.1) == {1: 1, 3: 1, 5: 1}
  # 1 against e^-.5 + e^-1 = 0.97 and + e^-2 = 1.11.
  assert predict(0.2) == {1: 1, 3: 1, 5: 0}
  assert predict(10.0) == {1: 1, 3: 0, 5: 0}


def test_equal_votes_go_to_the_lowest_class():
  neighbours = knn.Neighbours(np.ones((1, 2), np.float32), np.array([[0, 1]]))
  got = knn.predict(neighbours, np.array([2, 1], np.int32), ks=(2,), classes=3)
  assert list(got[2]) == [1]


def test_invalid_features_are_rejected():
  rows = np.ones((3, 2), np.float32)
  with pytest.raises(ValueError, match="k=4; expected 1 to the bank's 3 rows"):
    knn.find_neighbours(rows, rows, k=4)
  with pytest.raises(ValueError, match="3 of 3 bank are not finite"):
    knn.find_neighbours(rows, rows * np.nan, k=1)


def test_no_block_exceeds_its_bytes(mesh, monkeypatch):
  """Memory per device does not grow with the size of the bank."""
  sizes = []

  def spy(mesh):
    def merge(values, index, queries, block, limits):
      sizes.append(4 * queries.shape[0] // 8 * block.shape[0])
      sizes.append(block.nbytes)
      return values, index

    return merge

  monkeypatch.setattr(knn, "_merge_fn", spy)
  rng = np.random.default_rng(0)
  bank = rng.normal(size=(20_000, 4)).astype(np.float32)
  knn.find_neighbours(bank, bank, k=200, mesh=mesh, block_bytes=2**20)
  assert len(sizes) > 20
  assert 2**19 < max(sizes) <= 2**20


def test_a_folder(tmp_path, write_image, colours):
  for name in ("red", "green"):
    for i in range(3):
      write_image(tmp_path / "train" / name / f"{i}.png", name)
    write_image(tmp_path / "test" / name / "0.png", name)
  # A green image labelled red.
  write_image(tmp_path / "train" / "red" / "mislabelled.png", "green")
  evaluator = knn.KNN(data=str(tmp_path), view="encoder", k=(1, 3, 100))
  evaluator.prepare()
  result = evaluator.run(colours)
  assert result.errors.keys() == result.metrics.keys()
  # Ties go to the first neighbour, "green/0.png".
  assert result.metrics == {"top1_k1": 1.0, "top1_k3": 1.0, "top1_k7": 1.0}
  assert result.chance["top1_k3"] == 0.5
  assert result.protocol["train_images"] == 7
  assert result.protocol["k"] == [1, 3, 7]


def test_chance_knows_frequent_training_classes():
  def labelled(labels):
    return ClassificationSet(
      name="", images=open_items([]), digest="", classes=None, ids=None,
      labels=np.array(labels, np.int32),
    )  # fmt: skip

  train, test = labelled([0, 0, 1, 1, 2, 3]), labelled([0, 0, 0, 1, 2, 4])
  splits = Splits(train, test, 5, range(5))
  # Classes 0 and 1 are equally frequent: 3 of 6, or 1 of 6, are correct.
  assert majority_accuracy(splits, k=1) == pytest.approx(1 / 3)
  assert majority_accuracy(splits, k=2) == pytest.approx(4 / 6)
  # Then 2 or 3.
  assert majority_accuracy(splits, k=3) == pytest.approx(4.5 / 6)
  only = Splits(train, labelled([1, 1, 4]), 5, scored=(1, 4))
  assert majority_accuracy(only, k=1) == pytest.approx(2 / 3)
  assert majority_accuracy(only, k=5) == 1


@pytest.mark.reference
@pytest.mark.parametrize("k", [1, 5, 20])
def test_predictions_are_those_of_scikit_learn(mesh, k):
  from sklearn.neighbors import KNeighborsClassifier

  rng = np.random.default_rng(2)
  bank = normalize(rng.normal(size=(300, 6)).astype(np.float32))
  queries = normalize(rng.normal(size=(200, 6)).astype(np.float32))
  labels = rng.integers(0, 7, 300).astype(np.int32)
  weights = dict(weights=lambda d: np.exp((1 - d) / 0.07))
  oracle = KNeighborsClassifier(
    k, metric="cosine", algorithm="brute", **weights
  )
  want = oracle.fit(bank, labels).predict(queries)
  neighbours = knn.find_neighbours(queries, bank, k=20, mesh=mesh)
  got = knn.predict(neighbours, labels, ks=(k, 20), classes=7)[k]
  assert list(got) == list(want)
  assert 0.02 < np.mean(want != labels[neighbours.index[:, 0]]) < 1 or k == 1
