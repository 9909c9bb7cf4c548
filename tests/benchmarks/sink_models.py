"""Small gpt-oss models trained on CPython's documentation, alike but for the learned sinks in their softmax.

They are trained as the embedded model is (`streamllm.testbed.train`), with its tokenizer and optimizers: plain language
modelling first; then a loss that asks every head of every layer but the first to leave attention unused where it has
no better use for it. Unused is what is on the first token of the window, or on the learned sink where there is one:
which of the two, the loss does not say. Every window begins with the same token, as every stream has to.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM

from streamllm.testbed.train import Muon, schedule

FIRST = 0
"""The token that begins windows and streams: the tokenizer's, which is in no text."""
UNLEARNED = -1e4
"""A sink's logit where it has none: its weight is exactly 0 then."""
_NAME = "streamllm_unused_attention"


@dataclass(frozen=True)
class Recipe:
    steps: int = 1200
    batch: int = 4
    trained_length: int = 256
    vocabulary: int = 1024
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 3e-3  # AdamW: embeddings, norms, biases, sinks
    matrix_learning_rate: float = 2e-2  # Muon: the matrices between them
    weight_decay: float = 0.1
    warmup: int = 50
    decay: float = 0.6  # the last part of the steps, in which the rates fall to zero
    clip: float = 1.0
    unused_from: int = 500  # steps of plain language modelling first
    unused_full: int = 700
    unused_weight: float = 0.1
    unused_mass: float = 0.95


@dataclass(frozen=True)
class Variant:
    sink_rate: float
    """How much faster than other vectors its learned sinks are learned; 0: it has none."""
    seed: int

    @property
    def learned(self) -> bool:
        return self.sink_rate > 0

    @property
    def name(self) -> str:
        return f"rate-{self.sink_rate:g}-seed-{self.seed}"


class UnusedAttention:
    """Causal attention that also collects, from all layers but the first, the mean of

        relu(log mass - log(weight on the first token + weight on the learned sink))

    torch's fused kernel does all of it. A learned sink is a key before all others that only one more channel of the
    queries, always 1, sees; and one more channel of the values, 1 for that key and for the first token, sums up their
    weights. Its output but for that channel is what the model's own attention gives.
    """

    def __init__(self, mass: float) -> None:
        self.log_mass = math.log(mass)
        self.terms: list[Tensor] = []

    def __call__(
        self,
        module: Any,
        query: Tensor,  # (windows, heads, length, size), as key and value
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        s_aux: Tensor,  # (heads)
        dropout: float = 0.0,
        **_: object,
    ) -> tuple[Tensor, None]:
        windows, _heads, _length, size = query.shape
        sink = F.pad((s_aux / scaling)[None, :, None, None], (size, 0)).expand(windows, -1, -1, -1)
        query = F.pad(F.pad(query, (0, 1), value=1.0), (0, 0, 1, 0))
        key = torch.cat((sink, F.pad(key, (0, 1))), 2)
        value = F.pad(F.pad(value, (0, 1)), (0, 0, 1, 0))
        value[:, :, :2, size] = 1.0
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)[:, :, 1:]
        if module.layer_idx > 0:
            self.terms.append((self.log_mass - output[:, :, 1:, size].log()).relu().mean())
        return output[..., :size].transpose(1, 2).contiguous(), None

    def collect(self) -> Tensor:
        total = torch.stack(self.terms).mean()
        self.terms.clear()
        return total


class _OnlyExpert(nn.Module):
    """Weights (out, in), which is what Muon takes, as those (1, in, out) of a mixture of one expert."""

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.T[None]

    def right_inverse(self, weights: Tensor) -> Tensor:
        return weights[0].T.contiguous()


def build_model(recipe: Recipe, variant: Variant) -> GptOssForCausalLM:
    """Of one expert, which is no mixture, and without sliding windows: what it forgets is up to the policy."""
    config = GptOssConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        num_local_experts=1,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * recipe.layers,
        max_position_embeddings=recipe.trained_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=FIRST,
        eos_token_id=FIRST,
    )
    torch.manual_seed(variant.seed)
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        if not variant.learned:
            nn.init.constant_(layer.self_attn.sinks, UNLEARNED)
            layer.self_attn.sinks.requires_grad_(False)
    return model


def optimizers(model: GptOssForCausalLM, recipe: Recipe, sink_rate: float) -> list[torch.optim.Optimizer]:
    """As the embedded model's. The router of a single expert has nothing to learn."""
    named = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and ("_proj" in name) and "bias" not in name]
    embeddings = [p for name, p in named if "embed_tokens" in name or "lm_head" in name]
    sinks = [p for name, p in named if "sinks" in name]
    rest = [*matrices, *embeddings, *sinks]
    vectors = [p for name, p in named if "router" not in name and not any(p is q for q in rest)]
    muon = Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay)
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if sinks:
        groups.append({"params": sinks, "weight_decay": 0.0, "lr": sink_rate * recipe.learning_rate})
    adamw = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    return [muon, adamw]


def unused_weight(step: int, recipe: Recipe) -> float:
    """Nothing, then a ramp: heads have to learn what attention is good for before they are asked to leave it."""
    ramp = (step - recipe.unused_from) / (recipe.unused_full - recipe.unused_from)
    return recipe.unused_weight * min(1.0, max(0.0, ramp))


def windows_of(tokens: Tensor, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """(batch, trained length) each."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(recipe.trained_length - 1)
    while True:
        starts = torch.randint(len(tokens) - len(offsets), (recipe.batch, 1), generator=generator)
        yield F.pad(tokens[starts + offsets], (1, 0), value=FIRST)


def train(
    tokens: Tensor,
    recipe: Recipe,
    variant: Variant,
    look: Callable[[GptOssForCausalLM], dict[str, Any]],
    every: int = 100,
) -> tuple[GptOssForCausalLM, list[dict[str, Any]]]:
    """tokens (n) of the training text -> the model, and what `look` saw of it each so many steps."""
    attention, seen = UnusedAttention(recipe.unused_mass), []
    AttentionInterface.register(_NAME, attention)
    model = build_model(recipe, variant)
    experts = [layer.mlp.experts for layer in model.model.layers]
    for expert in experts:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(expert, name, _OnlyExpert())
    steppers = optimizers(model, recipe, variant.sink_rate)
    groups = [(group, group["lr"]) for stepper in steppers for group in stepper.param_groups]
    started = time.monotonic()
    for step, windows in zip(range(recipe.steps), windows_of(tokens, recipe, variant.seed), strict=False):
        for group, rate in groups:
            group["lr"] = rate * schedule(step, recipe)
        model.set_attn_implementation(_NAME)
        logits = model(windows, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        (loss + unused_weight(step, recipe) * attention.collect()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for stepper in steppers:
            stepper.step()
        model.zero_grad()
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            seen.append({"step": step + 1, "seconds": round(time.monotonic() - started), **look(model)})
            print(variant.name, seen[-1], flush=True)
    for expert in experts:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.remove_parametrizations(expert, name)
    return model, seen


def save(model: GptOssForCausalLM, seen: list[dict[str, Any]], recipe: Recipe, folder: Path) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    model.save_pretrained(folder)
    facts = {"recipe": asdict(recipe), "seen": seen, "parameters": model.num_parameters()}
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
