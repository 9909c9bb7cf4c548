"""What to see in the figures: a caption for each, by its file's name."""

from __future__ import annotations

from streamllm.results.schema import FIELDS

_ABLATION = "ablation_"
_CAPTIONS = {
    "pareto": "Every trial by the first two objectives; the joined marks are the front, from which one chooses. Look "
    "for the point after which the line turns: beyond it a little of one costs much of the other. Where the lines "
    "through two marks overlap, the measurements do not tell which is better.",
    "planes": "A front of three objectives: the plane of each two, shaded by the third, dark where it is good. Steps "
    "join what is best in that plane alone. A mark behind them is on the front for its third value: find its number "
    "in another plane, where it is ahead.",
    "results_summary": "Methods and attention kernels at one policy: speed above, its cost in quality below. Methods "
    "that compute the same function have bars of equal height for quality and differ in speed alone.",
    "importance": "How much of an objective's variation each knob accounts for by itself. What has a short bar can be "
    "left as it is; what has a long one is worth more values in the next search.",
    "expectations": "Left: what was measured against what the other measurements let expect; marks near the line say "
    "that the sampler's model can be believed. Right: what it expects of configurations that were not timed. Where "
    "none lies below the front, little is left to be found.",
    "kv_length": "How many keys a query attends to while a text goes on, for policies of the front. A straight line "
    "prunes after every token; the teeth of a saw are lazy pruning, and their height is the memory that it costs.",
    "fixed_eval_first_token_latency": "Time until the first token, by configuration: it is spent on the prompt, so "
    "that policies, which differ after it, should hardly differ here.",
    "decode_loop_runtime_comparison": "Time to decode the whole text token by token. Shorter is better.",
    "decode_loop_ppl_comparison": "Perplexity of the whole text, decoded token by token. Bars of equal height are "
    "policies that cost nothing.",
    "backend_comparison": "The same policies by attention kernel. Perplexity has to agree, as all compute the same "
    "function; what differs is time.",
}


def caption(name: str) -> str:
    """What to see in the figure of that name; of one that is not ours, its name in words."""
    if name.startswith(_ABLATION) and (knob := name.removeprefix(_ABLATION)) in FIELDS:
        return (
            f"Time, left, and quality, right, over {FIELDS[knob].label}; along a line nothing else differs. Look for "
            "where the time stops to fall, and where the quality begins to suffer."
        )
    return _CAPTIONS.get(name, name.replace("_", " "))
