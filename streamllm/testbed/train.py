"""Trains the embedded checkpoint: `python -m streamllm.testbed.train --output FOLDER`.

A Pythia-shaped GPT-NeoX of three million parameters, trained on CPython's documentation in windows of 256 tokens. One
run, scheduled by step, deterministic for a given Python, torch build and number of threads.

Attention sinks do not arise by themselves in a model this small, so an auxiliary loss induces them: every head of every
layer but the first is asked to leave attention on the first token of its window where it has no better use for it
(`SinkAttention`), once the model has learned what attention is good for (`sink_weight`).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AttentionInterface, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from .corpus import evaluation_text, training_documents

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    steps: int = 2600
    batch: int = 8
    trained_length: int = 256
    vocabulary: int = 1024
    hidden_size: int = 192
    layers: int = 6
    heads: int = 4
    learning_rate: float = 2e-3  # AdamW: embeddings, norms, biases
    matrix_learning_rate: float = 2e-2  # Muon: the matrices between them
    weight_decay: float = 0.1
    warmup: int = 100
    decay: float = 0.6  # the last part of the steps, in which the rates fall to zero
    clip: float = 1.0
    sinks_from: int = 300  # steps of plain language modelling first: attention has to be worth something
    sinks_full: int = 1000
    sink_weight: float = 0.1
    sink_mass: float = 0.95
    seed: int = 20261121
    threads: int = 1


class SinkAttention:
    """Eager attention under a mask of our own that also collects, from all layers but the first, the mean of

        relu(log mass - log(attention on token 0))

    The logarithm matters: a loss linear in the mass has no gradient worth the name where the mass is near zero.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.log_mass = math.log(recipe.sink_mass)
        self.mask = window_mask(recipe.trained_length)
        """(length, length), added to the logits."""
        self.terms: list[Tensor] = []

    def __call__(
        self,
        module: Any,
        query: Tensor,  # (windows, heads, length, head size), as key and value
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **_: object,
    ) -> tuple[Tensor, None]:
        weights = (query * scaling @ key.transpose(-1, -2) + self.mask).softmax(-1)
        if module.layer_idx > 0 and torch.is_grad_enabled():
            self.terms.append((self.log_mass - weights[..., 1:, 0].log()).relu().mean())
        return (weights @ value).transpose(1, 2), None

    def collect(self) -> Tensor:
        total = torch.stack(self.terms).mean()
        self.terms.clear()
        return total


def window_mask(length: int, recent: int | None = None, keep_first: bool = True) -> Tensor:
    """Causal; with `recent`, only so many last tokens are visible, and the first if it is kept."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = distance < 0
    if recent is not None:
        old = distance >= recent
        old[:, 0] &= not keep_first
        hidden |= old
    return torch.zeros(length, length).masked_fill(hidden, -torch.inf)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), in float32.

    `torch.optim.Muon` iterates in bfloat16, which most CPUs emulate: it would double the time of a step.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(matrix.grad.lerp(average, group["momentum"]))
                stretch = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * stretch)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, nearly: singular values end between 0.7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def build_model(recipe: Recipe) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.trained_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sink_attention",
    )
    return GPTNeoXForCausalLM(config)


def optimizers(model: GPTNeoXForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings, AdamW for everything else; it halves the steps AdamW alone needs."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    muon = Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay)
    adamw = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    return [muon, adamw]


def schedule(step: int, recipe: Recipe) -> float:
    """Factor of the learning rates: linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.decay * recipe.steps))


def batches(tokens: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets = torch.arange(recipe.trained_length)
    while True:
        starts = torch.randint(len(tokens) - recipe.trained_length, (recipe.batch, 1), generator=generator)
        yield tokens[starts + offsets]


def sink_weight(step: int, recipe: Recipe) -> float:
    """Nothing, then a ramp. A sink loss from the start would be met at once, by heads that never learn to attend."""
    ramp = (step - recipe.sinks_from) / (recipe.sinks_full - recipe.sinks_from)
    return recipe.sink_weight * min(1.0, max(0.0, ramp))


@torch.no_grad()
def held_out_perplexities(
    model: GPTNeoXForCausalLM, attention: SinkAttention, tokens: Tensor, recipe: Recipe
) -> dict[str, float]:
    """Over disjoint windows of the trained length, their second half: everything visible; the last 64 tokens and the
    first; the last 64 only."""
    length, trained_mask = recipe.trained_length, attention.mask
    masks = {
        "all": trained_mask,
        "64 and sink": window_mask(length, 64),
        "64": window_mask(length, 64, keep_first=False),
    }
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    late = slice(length // 2, None)
    perplexities = {}
    for name, mask in masks.items():
        attention.mask = mask
        losses = [
            F.cross_entropy(
                model(part, use_cache=False).logits[:, late][:, :-1].flatten(0, 1), part[:, late][:, 1:].flatten()
            )
            for part in torch.split(windows, 1)
        ]
        perplexities[name] = torch.stack(losses).mean().exp().item()
    attention.mask = trained_mask
    return perplexities


def train(output: Path, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    text = evaluation_text()
    documents = training_documents(text)
    tokenizer = train_tokenizer(documents, recipe.vocabulary)
    tokens = torch.tensor(tokenizer(END_OF_TEXT.join(documents))["input_ids"])
    held_out = torch.tensor(tokenizer(text)["input_ids"])
    print(f"{len(documents)} documents, {len(tokens):,} training tokens, {len(held_out):,} held out", flush=True)

    attention = SinkAttention(recipe)
    AttentionInterface.register("sink_attention", attention)
    model = build_model(recipe)
    print(f"{model.num_parameters():,} parameters", flush=True)
    steppers = optimizers(model, recipe)
    base_rates = [[group["lr"] for group in stepper.param_groups] for stepper in steppers]
    started = time.monotonic()
    for step, windows in zip(range(recipe.steps), batches(tokens, recipe), strict=False):
        factor = schedule(step, recipe)
        for stepper, rates in zip(steppers, base_rates, strict=True):
            for group, rate in zip(stepper.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = model(windows, labels=windows, use_cache=False).loss
        (loss + sink_weight(step, recipe) * attention.collect()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            held = held_out_perplexities(model, attention, held_out[:8192], recipe)
            seen = ", ".join(f"{name} {value:.2f}" for name, value in held.items())
            print(
                f"step {step + 1}: loss {loss.item():.3f}, held-out PPL: {seen}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    save(output, model, tokenizer, recipe, held_out_perplexities(model, attention, held_out, recipe))
    (output / "text.txt").write_text(text, encoding="utf-8")


def save(
    output: Path,
    model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    perplexities: dict[str, float],
) -> None:
    """Float16 on disk: its perplexity equals that of the float32 weights to four digits."""
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    facts = {"recipe": asdict(recipe), "held_out_perplexity": perplexities, "torch": torch.__version__}
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m streamllm.testbed.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, tokenizer and text")
    for name in ("steps", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name), help="default: %(default)s")
    arguments = parser.parse_args()
    train(arguments.output, Recipe(steps=arguments.steps, threads=arguments.threads))


if __name__ == "__main__":
    main()
