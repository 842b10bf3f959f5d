"""One cluster of real processes for the whole run; the helpers of the API tests are used here too."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "api"))

import pytest

from load import Load
from server import Server


@pytest.fixture(scope="session")
def cluster():
    with Server("--processes", "--sequences", "64", "--rebalance-s", "0") as running:
        yield running


@pytest.fixture(scope="session")
def load(cluster):
    return Load(cluster)
