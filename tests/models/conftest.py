"""What tests of this folder ask: the folder of a tiny language model."""

import pytest
from folders import llm_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llm_folder(tmp_path_factory.mktemp("models") / "llm")
