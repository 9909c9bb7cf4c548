import fcntl
import os
import resource
import time

import numpy as np
import pytest

from streamllm.files import remove_torn
from streamllm.measuring.store import Measurement, MeasurementStore, StoreError

KEY = {"policy": [4, 60], "model": "a"}


def test_what_is_put_is_found_under_its_key_only(tmp_path):
    store = MeasurementStore(tmp_path)
    losses = np.array([[0.0, 1.5], [7.0, 2.5]])
    store.put(KEY, Measurement({"perplexity": 3.0}, losses))
    found = MeasurementStore(tmp_path).get(dict(reversed(KEY.items())))
    assert found.record == {"perplexity": 3.0}
    np.testing.assert_array_equal(found.losses, losses)
    assert store.get(KEY | {"model": "b"}) is None
    assert not list(tmp_path.rglob(".*")), "no temporary files stay behind"


def test_a_torn_entry_is_kept_aside_and_measured_again(tmp_path):
    store = MeasurementStore(tmp_path)
    for damage in ("*.json", "*.npy"):
        store.put(KEY, Measurement({"perplexity": 3.0}, np.zeros((2, 2))))
        (file,) = tmp_path.rglob(damage)
        file.write_bytes(file.read_bytes()[:10])
        assert store.get(KEY) is None
        assert len(list(tmp_path.rglob("*.damaged"))) == 1
        store.put(KEY, Measurement({"perplexity": 3.0}))
        assert store.get(KEY).record == {"perplexity": 3.0}


def test_losses_without_their_record_are_no_measurement(tmp_path):
    """A kill between the two writes."""
    store = MeasurementStore(tmp_path)
    store.put(KEY, Measurement({}, np.zeros((2, 2))))
    next(tmp_path.rglob("*.json")).unlink()
    assert store.get(KEY) is None


@pytest.mark.parametrize("file", ["*.json", "*.npy"])
def test_an_entry_whose_numbers_were_changed_is_damaged(tmp_path, file):
    store = MeasurementStore(tmp_path)
    store.put(KEY, Measurement({"perplexity": 3.25}, np.array([[0.0, 1.5]])))
    (path,) = tmp_path.rglob(file)
    content = path.read_bytes()
    changed = content.replace(b"3.25", b"3.26") if file == "*.json" else content[:-1] + b"\x40"
    assert changed != content
    path.write_bytes(changed)
    assert store.get(KEY) is None
    assert len(list(tmp_path.rglob("*.damaged"))) == 1


def test_a_full_disk_leaves_nothing_behind_and_says_what_to_do(tmp_path):
    """The limit is the kernel's own; it stands in for a full disk."""
    store = MeasurementStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StoreError, match=r"cannot be written \(File too large\): make room there"):
            store.put(KEY, Measurement({"perplexity": 3.0}, np.zeros((1000, 2))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.get(KEY) is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_killed_writers_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    (tmp_path / "a3").mkdir()
    torn, fresh, mine = (tmp_path / "a3" / name for name in (".x.json.1.new", ".y.json.2.new", "z.json"))
    for path in (torn, fresh, mine):
        path.write_text("{")
    long_ago = time.time() - 60
    os.utime(torn, (long_ago, long_ago))
    remove_torn(tmp_path)
    assert not torn.exists() and fresh.exists() and mine.exists()
    os.utime(fresh, (long_ago, long_ago))
    with fresh.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does
        remove_torn(tmp_path)
        assert fresh.exists()
    remove_torn(tmp_path)
    assert not fresh.exists()
