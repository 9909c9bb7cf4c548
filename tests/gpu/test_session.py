"""`pytest -m gpu`: the tests that want a GPU see it; no others are run there."""

import pytest

pytestmark = pytest.mark.gpu


def test_the_engine_is_on_the_gpu():
    from streamllm.engine.device import default_device

    assert default_device().type == "cuda"
