"""Tasks that ask for what a stream said, at distances from well inside a cache to far outside; nothing is downloaded.

`texts` says what they are, once for `python -m streamllm recall` and for lm-evaluation-harness, whose task files lie
beside it: `lm_eval --include_path` this folder.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
