"""A browser for the tests of pages."""

import chromium
import pytest


@pytest.fixture(scope="session")
def browser():
  path = chromium.find_browser()
  if path is None:
    pytest.skip(f"needs one of {', '.join(chromium.NAMES)}")
  with chromium.launch(path) as browser:
    yield browser
