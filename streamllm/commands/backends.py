"""examples:
python -m streamllm backends                                 on the default device, in the dtype it does well
python -m streamllm backends --dtype float16 --head-size 128
python -m streamllm backends --json                          for scripts: flash_enabled, smoke_test
"""

import argparse
import json
import sys

from ..options import DTYPES
from ..terminal.printing import say

_MOST_HEAD_SIZE = 16384
HELP = "which attention backends run here, found out by running them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="number format (auto: what the device does well)"
    )
    parser.add_argument(
        "--head-size", type=int, default=64, metavar="N", help="size of the model's attention heads (64)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON; flash_enabled: a flash kernel ran; smoke_test: and its output is that of eager attention",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..engine.backends import BACKENDS
    from ..engine.device import default_device, device_name, resolve_dtype, unverified
    from ..engine.probing import probe_backend
    from ..errors import UsageError

    if not 1 <= arguments.head_size <= _MOST_HEAD_SIZE:
        raise UsageError(f"head_size {arguments.head_size}: must be a whole number from 1 to {_MOST_HEAD_SIZE}")
    device = default_device()
    if (doubt := unverified(device)) is not None:
        print(f"warning: {doubt}", file=sys.stderr)
    dtype = resolve_dtype(arguments.dtype, device)
    probes = {name: probe_backend(backend, device, dtype, arguments.head_size) for name, backend in BACKENDS.items()}
    if arguments.json:
        flash = probes["flash"]
        outcome = {"flash_enabled": flash.kernel == "flash", "smoke_test": flash.available}
        say(json.dumps(outcome | {"backends": {name: probe.kernel for name, probe in probes.items()}}, indent=2))
        return 0
    shown = str(dtype).removeprefix("torch.")
    say(f"{device_name(device)}, {shown}, head size {arguments.head_size}")
    say(f"{'asked for':20}{'runs':20}why not")
    for name, probe in probes.items():
        say(f"{name:20}{probe.kernel or '-':20}{probe.error or ''}".rstrip())
    return 0
