"""Each is run alone, and in the whole model: the last column is the largest difference of any logit to those by `math`.

examples:
python -m streamllm backends                                 on the default device, in the dtype it does well
python -m streamllm backends --dtype float16 --model EleutherAI/pythia-2.8b
python -m streamllm backends --json                          for scripts: flash_enabled, smoke_test, logit_difference
"""

import argparse
import json

from ..terminal.arguments import add_model_arguments
from ..terminal.output import messages_on_stderr
from ..terminal.printing import say
from ..terminal.progress import working

_MOST_HEAD_SIZE = 16384
HELP = "which attention backends run here, found out by running them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser.add_argument_group("what is run"))
    parser.add_argument(
        "--head-size", type=int, metavar="N", help="size of the attention heads of one call (the model's)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON; flash_enabled: a flash kernel ran; smoke_test: and its output is that of eager attention",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..errors import UsageError

    size = arguments.head_size
    if size is not None and not 1 <= size <= _MOST_HEAD_SIZE:
        raise UsageError(f"head_size {size}: must be a whole number from 1 to {_MOST_HEAD_SIZE}")

    from ..engine.backends import BACKENDS
    from ..engine.device import device_name
    from ..engine.loading import load_model
    from ..engine.probing import probe_layers
    from ..explain.backend_logits import logit_differences

    with messages_on_stderr(), working(f"loading {arguments.model}"):
        loaded = load_model(arguments.model, arguments.dtype, quantization=arguments.quantization)
    probes = {name: probe_layers(backend, loaded, 8, size) for name, backend in BACKENDS.items()}
    device, dtype, size = loaded.device, loaded.dtype, size or loaded.head_size
    with messages_on_stderr(), working("the whole model"):
        differences, largest = logit_differences(loaded, [name for name, probe in probes.items() if probe.available])
    if arguments.json:
        flash = probes["flash"]
        outcome = {"flash_enabled": flash.kernel == "flash", "smoke_test": flash.available}
        kernels = {name: probe.kernel for name, probe in probes.items()}
        say(json.dumps(outcome | {"backends": kernels, "logit_difference": differences}, indent=2))
        return 0
    shown = str(dtype).removeprefix("torch.")
    say(f"{device_name(device)}, {shown}, head size {size}")
    say(f"{'asked for':20}{'runs':20}{'logits off by':16}why not")
    for name, probe in probes.items():
        off = f"{differences[name]:.1e}" if name in differences else ""
        say(f"{name:20}{probe.kernel or '-':20}{off:16}{probe.error or ''}".rstrip())
    say(f"logits: of the whole model {arguments.model}, up to {largest:.3g} in size; the largest difference to math's")
    return 0
