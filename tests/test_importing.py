"""What is imported for good, and how garbage is looked for afterwards."""

import json
import subprocess
import sys

SCRIPT = """
import gc, json, sys
from orchestrator.workers.importing import import_libraries
import_libraries()
is_there = "transformers.modeling_utils" in sys.modules
print(json.dumps([gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects()), is_there]))
"""


def test_no_garbage_is_looked_for_among_libraries():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    is_enabled, frozen, looked_through, is_there = json.loads(ran.stdout)
    assert is_enabled and is_there
    assert frozen > 100 * looked_through
    assert not ran.stderr, "hushed, torchao too"
