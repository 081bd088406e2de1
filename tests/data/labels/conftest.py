"""Label sets that several tests read; do not change them."""

import label_samples
import pytest


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
  return label_samples.make_all(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def copy(tmp_path):
  return label_samples.make_copy(tmp_path)
