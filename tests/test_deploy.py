"""The recommended trial as a script, a `custom_generate` folder, llama.cpp's flags: each runs, or does as it says."""

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

import streamllm
from dashboards.deploy import main
from dashboards.deployment import TARGETS, Trial, of_halves
from streamllm.policy import Schedule
from streamllm.results.study import load_study
from streamllm.testbed import MODEL_FOLDER

from .made_studies import row, write_study

LAZY = {"window_size": 28, "compress_every": 8, "cache_slack": 4, "peak_kv": 44}


@pytest.fixture
def deploy(tmp_path):
    """The files for a trial with such values."""

    def deploy(target, **values):
        write_study(tmp_path, [row(3, 2.0, 1.0, **values)])
        study = load_study(str(tmp_path / "sweeps" / "s"))
        return TARGETS[target](Trial.of(study, study.trials[0]))

    return deploy


def test_the_script_streams(deploy, capsys):
    (script,) = deploy("streaming-cache", **LAZY).values()
    exec(compile(script, "stream.py", "exec"), {})
    assert capsys.readouterr().out.endswith("tokens seen, 33 in the cache\n"), "4 sinks, 28 recent tokens, itself"
    assert "Its perplexity is that of S=4 W=28 R=1 slack=0 drop=0;" in " ".join(script.replace("#", "").split())
    assert "window_size=39 has" in script


def test_the_folder_generates_what_the_cache_does(deploy, tmp_path, monkeypatch):
    for name, content in deploy("custom-generate", **LAZY).items():
        (path := tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    prompt = torch.arange(5, 25)[None]
    usual = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = streamllm.StreamingCache(model, n_sink=4, window_size=28)
    expected = model.generate(prompt, past_key_values=cache, **usual)
    found = model.generate(prompt, custom_generate=str(tmp_path / "own"), trust_remote_code=True, **usual)
    assert found.tolist() == expected.tolist()
    assert found.tolist() != model.generate(prompt, **usual).tolist(), "without it they are others"
    wider = streamllm.StreamingCache(model, n_sink=4, window_size=100)
    given = {"custom_generate": str(tmp_path / "own"), "trust_remote_code": True, "past_key_values": wider}
    model.generate(prompt, **given, **usual)
    assert wider.get_seq_length() == 79, "one that is given is gone on with"


@pytest.mark.parametrize(("n_sink", "peak"), [(0, 257), (4, 257), (5, 600), (64, 513)])
def test_llama_cpp_is_the_policy_that_is_told(n_sink, peak, deploy):
    """As its completion does it: n_discard = (n_past - n_keep) / 2 where n_past + 1 >= n_ctx."""
    (script,) = deploy("llama.cpp", n_sink=n_sink, peak_kv=peak).values()
    flags = script.splitlines()[-1].split()
    context, keep = int(flags[flags.index("-c") + 1]), int(flags[flags.index("--keep") + 1])
    assert context % 256 == 0 and context <= peak and keep == n_sink
    policy = of_halves(Trial("s", 3, "m", streamllm.Configuration("ours", streamllm.EvictionPolicy(n_sink=n_sink)),
                             "float32", peak, False), context)  # fmt: skip
    options = f"--n-sink {n_sink} --window-size {policy.window_size} --cache-slack {policy.cache_slack}"
    assert f"python -m streamllm evaluate --model testbed {options}\n" in script
    schedule, held = Schedule(policy), 0
    for _ in range(4 * context):
        if held + 1 >= context:
            held -= (held - keep) // 2
        assert schedule.held == held, "what the next token finds in the cache"
        held += 1
        schedule.after_token()


@pytest.mark.parametrize(
    ("values", "flags", "said"),
    [
        ({}, "-ctk f32 -ctv f32", "cache's f32: rounding adds up"),
        ({"dtype": "bfloat16"}, "-ctk f16 -ctv f16", "It cannot shift keys in bf16"),
        ({"kv_dtype": "float8_e4m3"}, "-ctk q8_0 -ctv q8_0 -fa on", "no float8: q8_0 is the nearest"),
        ({"bos": True}, "--keep 3 ", "the 4 sinks is the BOS"),
        ({"bos": True, "n_sink": 0}, "--keep 0 ", "It keeps the BOS, the trial had no sinks"),
        ({"positions": "keep"}, "-c 256", "positions=keep is not to be had"),
        ({"method": "ring", "layer_budgets": "pyramid:50"}, "-c 256", "layer_budgets=pyramid:50 is not to be had"),
    ],
)
def test_llama_cpp_says_what_it_does_not_do(values, flags, said, deploy):
    (script,) = deploy("llama.cpp", **values).values()
    assert flags in script.splitlines()[-1] and said in " ".join(script.replace("# ", "").split())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kv_dtype": "float16"}, "in the model's float32, not in float16"),
        ({"positions": "keep"}, "positions=keep is not to be had"),
        ({"method": "ring", "layer_budgets": "pyramid:50"}, "layer_budgets=pyramid:50 is not to be had"),
        ({"quantization": "int8_weight_only"}, "quantize them by int8_weight_only"),
    ],
)
def test_the_cache_says_what_it_does_not_do(values, said, deploy):
    files = deploy("custom-generate", **values)
    assert (
        said in " ".join(files["custom_generate/generate.py"].replace("# ", "").split()) and said in files["README.md"]
    )
    assert "evicts at every token" not in files["README.md"], "as it was measured"


def test_the_command(tmp_path, capsys):
    write_study(tmp_path, [row(0, 2.0, 9.0), row(1, 3.0, 2.0, n_sink=6), row(2, 9.0, 9.0, method="dense")])
    study = str(tmp_path / "sweeps" / "s")
    assert main([study]) == 0
    assert "n_sink=6, window_size=252" in capsys.readouterr().out, "the recommended one"
    assert main([study, "--trial", "0", "--output", str(tmp_path / "out")]) == 0
    assert "n_sink=4" in (tmp_path / "out" / "stream.py").read_text()
    assert main([study, "--as", "custom-generate"]) == 0
    assert (tmp_path / "sweeps/s/custom-generate/custom_generate/generate.py").exists()
    for trial, message in (("7", "trial '7': must be one that is complete, of 0, 1, 2"), ("2", "trial 2: dense")):
        assert main([study, "--trial", trial]) == 2
        assert message in capsys.readouterr().err


def test_nothing_recommended_is_said(tmp_path, capsys):
    write_study(tmp_path, [row(0, 2.0, 9.0, feasible=False)])
    assert main([str(tmp_path / "sweeps" / "s")]) == 2
    assert "no trial is on its front; name one with --trial" in capsys.readouterr().err
