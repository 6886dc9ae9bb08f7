"""The tagger with its sites, output and padding named, for the tests of fits."""

from __future__ import annotations

import pytest

from tests.training.tagger_fits import wrapped


@pytest.fixture
def hooked():
    return wrapped()
