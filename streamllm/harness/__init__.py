"""Tasks of lm-evaluation-harness under any policy: quality as everybody reports it. All but `scoring` and `writing`
need the harness (`pip install 'streamllm-sweep[harness]'`)."""

from ..errors import UnavailableError
from ..libraries import installed


def check_installed() -> None:
    """Raises UnavailableError where the harness is not."""
    if installed("lm_eval") is None:
        raise UnavailableError("lm-evaluation-harness is not installed; pip install 'lm-eval>=0.4.13'")
