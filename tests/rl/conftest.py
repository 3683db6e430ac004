"""One toy problem for all tests on Ray."""

from __future__ import annotations

import pytest

from tests.toy import toy_bundle


@pytest.fixture(scope="session")
def bundle():
    return toy_bundle()


@pytest.fixture(scope="session")
def problem(bundle):
    return bundle.problem()
