"""The table of architectures is a test: what is accepted is exact at both doors, what is not is refused with a reason.

The popular ones always; `pytest tests/test_every_architecture.py --every-architecture` takes all that transformers
knows, and holds them to the committed table too. The check is that of `tests/benchmarks/architectures.py`.
"""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from .benchmarks.architectures import error_in, measure
from .zoo import ARCHITECTURES, known

TABLES = Path(__file__).parent / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACCEPTED = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma4_text", "phi", "phi3"),
    *("mistral", "ministral3", "mixtral", "gpt_oss", "smollm3", "olmo2", "olmo3", "deepseek_v2", "deepseek_v3", "glm4"),
    *("glm4_moe", "cohere", "cohere2", "granite", "exaone4", "starcoder2", "gpt_neox", "stablelm", "internlm3"),
)
REFUSED = {
    "falcon": "attention code of its own",
    "gptj": "rotary positions that its attention computes in code of its own",
    "hunyuan_v1_dense": "places count and not distances alone",
    "qwen3_next": "layers of another kind: linear_attention",
}
POPULAR = (*ACCEPTED, *REFUSED)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--every-architecture")
    metafunc.parametrize("name", ARCHITECTURES if everything else known(POPULAR))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_the_table_says(name, dtype, request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = measure(name, DTYPES[dtype])
    assert error_in(row) is None
    if name in ACCEPTED:
        assert row["engine"] == "accepted"
    if name in REFUSED:
        assert REFUSED[name] in row["engine"]
    if request.config.getoption("--every-architecture"):
        table = json.loads((TABLES / f"architectures-{dtype}.json").read_text())
        if table["transformers"] == transformers.__version__:
            known = next(known for known in table["rows"] if known["architecture"] == name)
            doors = ("engine", "cache")
            assert [row.get(door) for door in doors] == [known.get(door) for door in doors]
