"""Models whose files are damaged, incomplete or another model's: seen before any weight is read or worker started."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator import sweep
from streamllm.testbed import MODEL_FOLDER

from .conftest import GOLDEN
from .fuzz.inputs import good_gguf
from .refusals import command, dry_run, refusal, run


@pytest.fixture
def folder(tmp_path):
    """A model of 4 layers with a tokenizer, that may be damaged."""
    shutil.copytree(GOLDEN / "llama-tiny", tmp_path / "m")
    for file in MODEL_FOLDER.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "m")
    return tmp_path / "m"


def configured(**settings):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return damage


def without(*keys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in keys}))

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, share):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return damage


def removed(name):
    return lambda folder: (folder / name).unlink()


def reshaped(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def sharded(lacking=None, **index):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        names = sorted(weights)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        where = {name: part for part, those in parts.items() for name in those}
        for part, those in parts.items():
            save_file({name: weights[name] for name in those}, folder / part, {"format": "pt"})
        (folder / "model.safetensors").unlink()
        text = json.dumps({"metadata": {}, "weight_map": where} | index)
        (folder / "model.safetensors.index.json").write_text(text)
        if lacking:
            (folder / lacking).unlink()

    return damage


DAMAGES = {
    "strings for numbers": (configured(hidden_size="64"), "not a usable folder"),
    "a negative number": (configured(num_attention_heads=-4), "not a usable folder"),
    "zero": (configured(hidden_size=0), "not a usable folder"),
    "zero heads": (configured(num_attention_heads=0), "not a usable folder"),
    "null": (configured(num_hidden_layers=None), "not a usable folder"),
    "a list": (configured(vocab_size=[256]), "not a usable folder"),
    "a fraction": (configured(num_hidden_layers=2.5), "not a usable folder"),
    "layers without end": (configured(num_hidden_layers=10**12), "num_hidden_layers 1000000000000 in config.json"),
    "layers of a family that lists them": (
        configured(num_hidden_layers=10**9, model_type="qwen2"),
        "num_hidden_layers 1000000000 in config.json",
    ),
    "a size without end": (configured(hidden_size=10**12, head_dim=16), "not a usable folder"),
    "a vocabulary without end": (configured(vocab_size=10**15), "by config.json"),
    "another vocabulary": (configured(vocab_size=2000), "has the shape (256, 64) in its files, (2000, 64) by config"),
    "a trained length of nothing": (configured(max_position_embeddings=0), "max_position_embeddings 0"),
    "a trained length in words": (configured(max_position_embeddings="many"), "usable folder"),
    "no trained length": (configured(max_position_embeddings=None), "not a usable folder"),
    "no model type": (without("model_type", "architectures"), "not a usable folder"),
    "no sizes": (without("hidden_size", "num_hidden_layers", "vocab_size"), "not a usable folder"),
    "an unknown model type": (configured(model_type="nothing"), "not a usable folder"),
    "an unknown activation": (configured(hidden_act="x"), "not a usable folder"),
    "a model type that is a number": (configured(model_type=3), "not a usable folder"),
    "rope of nonsense": (configured(rope_parameters=[1]), "usable folder"),
    "a dtype of nonsense": (configured(dtype="float31", torch_dtype="float31"), "not a usable folder"),
    "a dtype that is a list": (configured(dtype=[1]), "not a usable folder"),
    "no configuration": (removed("config.json"), "config.json cannot be read"),
    "an empty configuration": (written("config.json", b""), "config.json is not JSON"),
    "a configuration that is a list": (written("config.json", b"[1]"), "config.json is not one JSON object"),
    "a configuration in another encoding": (written("config.json", b'{"a": "\xe9"}'), "config.json is not JSON"),
    "a configuration of NULs": (written("config.json", b"\0" * 99), "config.json is not JSON"),
    "a configuration without a bottom": (written("config.json", b"[" * 100_000), "config.json is not JSON"),
    "a configuration of digits": (written("config.json", b'{"a": ' + b"7" * 5000 + b"}"), "config.json is not JSON"),
    "weights torn": (cut("model.safetensors", 0.5), "model.safetensors is damaged or not all there"),
    "weights torn in the header": (cut("model.safetensors", 0.001), "model.safetensors is damaged or not all there"),
    "weights that are empty": (written("model.safetensors", b""), "model.safetensors is damaged or not all there"),
    "weights that are none": (written("model.safetensors", b"{}" * 9), "model.safetensors is damaged"),
    "a header without end": (written("model.safetensors", b"\xff" * 64), "model.safetensors is damaged"),
    "no weights": (removed("model.safetensors"), "no model.safetensors in it"),
    "weights of another shape": (reshaped, "model.norm.weight has the shape (7,) in its files, (64,) by config.json"),
    "fewer layers than weights": (configured(num_hidden_layers=50), "its files lack"),
    "a part missing": (sharded("b.safetensors"), "1 of its 2 parts are missing: 'b.safetensors'"),
    "an index without a map": (sharded(weight_map=None), "no weight_map"),
    "an index that is a list": (sharded(weight_map=["a.safetensors"]), "no weight_map"),
    "an index of numbers": (sharded(weight_map={"a": 3}), "no weight_map"),
    "an index of nothing": (sharded(weight_map={}), "no weight_map"),
    "what the engine has not": (
        configured(layer_types=["linear_attention"] * 4, model_type="qwen3_next"),
        "m'",
    ),
    "cross attention": (configured(cross_attention_layers=[1]), "has layers that attend to something else"),
    "no tokenizer": (removed("tokenizer.json"), "m'"),
    "a tokenizer torn": (cut("tokenizer.json", 0.5), "not a usable folder"),
    "an empty tokenizer": (written("tokenizer.json", b""), "not a usable folder"),
    "a tokenizer that is a list": (written("tokenizer.json", b"[]"), "not a usable folder"),
    "a tokenizer without a bottom": (written("tokenizer.json", b"[" * 100_000), "not a usable folder"),
    "a tokenizer's configuration torn": (cut("tokenizer_config.json", 0.5), "not a usable folder"),
}
OF_TEXT = [name for name in DAMAGES if "tokenizer" in name]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_a_line_for_the_sweep(name, folder):
    """Before Ray is started: a dry run says it, which starts nothing."""
    damage, message = DAMAGES[name]
    damage(folder)
    assert message in refusal(dry_run("--model", "m", cwd=folder.parent))


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in OF_TEXT])
def test_and_for_the_commands(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    what = ("--model", "m", "--token-ids", str(GOLDEN / "tokens.json"))
    assert message in refusal(command("evaluate", *what, cwd=folder.parent))


@pytest.mark.parametrize("verb", ["baseline", "diagnose", "profile", "recall", "generate"])
@pytest.mark.parametrize("name", ["weights torn", "a tokenizer torn", "layers without end"])
def test_every_command_says_it(name, verb, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    assert message in refusal(command(verb, "--model", "m", cwd=folder.parent))


def test_a_sweep_and_a_matrix_say_it_before_anything_is_started(folder):
    cut("model.safetensors", 0.5)(folder)
    for space in ("sink", "comprehensive"):
        done = run(sweep.main, "--model", "m", "--space", space, cwd=folder.parent)
        assert "model.safetensors is damaged" in refusal(done)
    assert not (folder.parent / "sweeps").exists()


@pytest.mark.parametrize("damage", [sharded(), configured(tie_word_embeddings=False)])
def test_what_is_whole_is_not_refused(damage, folder):
    damage(folder)
    what = ("--model", "m", "--token-ids", str(GOLDEN / "tokens.json"), "--space", "sink")
    done = dry_run(*what, cwd=folder.parent)
    assert done.returncode == 0, done.stderr


def test_packed_weights_have_shapes_of_their_own(folder):
    from transformers import AutoConfig

    from streamllm.engine.weight_files import check_weight_files

    config = AutoConfig.from_pretrained(str(folder))
    reshaped(folder)
    config.quantization_config = {"quant_method": "any"}
    assert check_weight_files("m", folder, config).num_parameters() > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole GGUF file"),
        (b"GGUF", "not a whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "not a whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\0" * 16, "not a whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\x01" + b"\0" * 7 + b"\xff" * 64, "not a whole GGUF file"),
        (b"\0" * 5000, "not a whole GGUF file"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_gguf_file(tmp_path, monkeypatch, content, message):
    pytest.importorskip("gguf")
    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    assert message in refusal(dry_run("--model", "m.gguf", cwd=tmp_path))


def test_a_damaged_copy_of_a_gguf_file(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setenv("STREAMLLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"any")
    copy = tmp_path / "cache" / "gguf" / hashlib.sha256(b"any").hexdigest()[:16]
    shutil.copytree(MODEL_FOLDER, copy)
    for content in ("{", "[]", '{"digest": "x"}'):
        (copy / "gguf.json").write_text(content)
        assert "damaged" in refusal(dry_run("--model", "m.gguf", cwd=tmp_path))


@pytest.mark.parametrize("folder", ["x" * 300, "/dev/null"])
def test_a_folder_for_copies_that_cannot_be_made(tmp_path, monkeypatch, folder):
    pytest.importorskip("gguf")
    monkeypatch.setenv("STREAMLLM_CACHE", folder)
    (tmp_path / "m.gguf").write_bytes(good_gguf())
    assert "let STREAMLLM_CACHE be a folder" in refusal(dry_run("--model", "m.gguf", cwd=tmp_path))
