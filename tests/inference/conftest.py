"""What tests of this folder ask: tiny models and pictures with a cache of their own, and a run made of them."""

import pytest
from exported import make_run
from folders import colour_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with colour_world(tmp_path_factory.mktemp("world"), train=8, val=4, layers=2) as path:
        yield path


@pytest.fixture(scope="module")
def run(world):
    return make_run(world)
