"""The harness' own command, with our model in it: `python -m streamllm.harness run --model streamllm --model_args
pretrained=smollm2,n_sink=4,window_size=1020 --tasks hellaswag`, and everything else that `lm_eval` can."""

import sys
from collections.abc import Sequence

from ..terminal.program import command
from . import check_installed


@command
def main(_: Sequence[str] | None = None) -> int:
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    from . import model  # noqa: F401  # registers it

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
