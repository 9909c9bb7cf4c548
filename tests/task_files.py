"""Small tasks of the harness as files, whose documents lie beside them."""

import json
from pathlib import Path

import yaml

from streamllm.testbed import TEXT_FILE

PARTS = [" ".join(part.split()) for part in TEXT_FILE.read_text(encoding="utf-8").split("\n\n") if len(part) > 300][:12]


def write_tasks(folder: Path) -> Path:
    """Tasks `choice`, `rolling`, `completion` (written) and `cloze` (a log-likelihood), of the embedded text."""
    words = [part.split() for part in PARTS]
    choices = [
        {"question": " ".join(of[:20]), "choices": [of[20], " ".join(of[25:30]), "a", "of the"], "answer": number % 4}
        for number, of in enumerate(words)
    ]
    _write(folder, "choice", choices, "multiple_choice", ["acc", "acc_norm"], doc_to_text="{{question}}",
           doc_to_choice="{{choices}}", doc_to_target="{{answer}}")  # fmt: skip
    texts = [{"text": part[:250]} for part in PARTS]
    _write(folder, "rolling", texts, "loglikelihood_rolling", ["word_perplexity", "bits_per_byte"], doc_to_text="",
           doc_to_target="{{text}}")  # fmt: skip
    prompts = [{"prompt": " ".join(of[:16]), "answer": of[16]} for of in words]
    _write(folder, "completion", prompts, "generate_until", ["exact_match"], doc_to_text="{{prompt}}",
           doc_to_target="{{answer}}", generation_kwargs={"until": [".", "\n"], "max_gen_toks": 8},
           filter_list=[{"name": "first", "filter": [{"function": "regex", "regex_pattern": r"^\s*(\S+)"},
                                                      {"function": "take_first"}]}])  # fmt: skip
    _write(folder, "cloze", prompts, "loglikelihood", ["perplexity", "acc"], doc_to_text="{{prompt}}",
           doc_to_target="{{answer}}")  # fmt: skip
    return folder


def _write(folder: Path, name: str, documents: list[dict], kind: str, metrics: list[str], **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": kind,
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | more))
