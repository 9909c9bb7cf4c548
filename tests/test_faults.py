"""Faults, injected for real: processes and nodes are killed, disks are full, memory is short, the model yields NaN.

After each, the same study goes on, and every finished trial is there exactly once.
"""

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from orchestrator.configuration import WorkerSettings
from orchestrator.driver import Driver
from orchestrator.search.study import Study
from orchestrator.workers import pool as pool_module
from orchestrator.workers.cluster import Cluster
from orchestrator.workers.device_kinds import device_kinds
from orchestrator.workers.messages import (
    Assignment,
    Subject,
    SweepError,
    Variant,
    WorkerSetup,
    WorkerUnusableError,
)
from orchestrator.workers.pool import WorkerPool, settings_for_workers
from orchestrator.workers.worker import Worker
from search_spaces import load_space
from streamllm.configuration import Configuration
from streamllm.engine.loading import weights_digest
from streamllm.errors import UsageError
from streamllm.measuring import store as store_module
from streamllm.measuring.jobs import Job
from streamllm.measuring.store import MeasurementStore
from streamllm.measuring.text import TextSource, load_tokens
from streamllm.policy import EvictionPolicy

from .conftest import GOLDEN, HIDDEN
from .faulty_workers import (
    FAULTS,
    Faulty,
    Hanging,
    NeverReady,
    OnAnotherDisk,
    OnNodes,
    ShortOfMemory,
    Telling,
    Unwilling,
    WithoutModel,
)
from .pretended import TEXT, scheduler
from .quick_sweep import Quick
from .test_driver import Log
from .waiting import wait_until

CAP = 48
VARIANT = Variant("float32", "none")


@pytest.fixture(scope="module", autouse=True)
def connected(cluster):
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def tokens(count=300):
    return load_tokens(TextSource(token_ids=GOLDEN / "tokens.json", max_eval_tokens=count), None, 10**6)


class Sweep:
    def __init__(self, folder: Path, sinks: list[int]):
        (folder / "space.yaml").write_text(f"cap: {CAP}\nparameters: {{n_sink: {sinks}}}\n")
        self.space = load_space(str(folder / "space.yaml"))
        self.folder = folder
        self.setup = WorkerSetup(str(GOLDEN / "neox-tiny"), VARIANT, folder)
        self.notes = []

    def pool(self, count, worker_class, **options):
        return WorkerPool(
            self.setup,
            WorkerSettings(count=count, **options),
            note=self.notes.append,
            worker_class=worker_class,
        )

    def run(self, worker_class=WithoutModel, count=2, observer=None, watcher=None, **options):
        """The study after it went on with such workers."""
        # A sampler that looks at no quality that it does not try: what kills a worker kills it then too.
        study = Study("s", self.folder / "journal.log", self.space, CAP, seed=1, sampler="tpe")
        pool = self.pool(count, worker_class, **options)
        watchers = [] if watcher is None else [watcher]
        try:
            of = scheduler(pool, self.folder, study.rows, self.notes.append, watchers)
            Driver(study, of, tokens(), VARIANT, 100, [observer or Log()], self.notes.append).run()
        finally:
            pool.shutdown()
        return study

    def stored(self):
        return {path: path.stat().st_mtime_ns for path in (self.folder / "store").rglob("*.json")}

    def check_going_on_changes_nothing(self, rows, worker_class=WithoutModel):
        before = self.stored()
        assert self.run(worker_class, count=1).rows == sorted(rows, key=lambda row: row["trial"])
        assert self.stored() == before


def answers(pool, count=1):
    """The pool's next so many, or a few more."""
    found = []
    wait_until(lambda: found.extend(pool.wait(0.1)) or len(found) >= count)
    return found


def silent_until(pool, condition):
    """Runs the pool, which has nothing to say until the condition holds."""

    def holds():
        return condition() or list(pool.wait(0.1)) != []

    wait_until(holds)
    assert condition(), "the pool spoke first"


def test_paths_and_settings_are_those_of_the_driver(tmp_path, monkeypatch):
    """On a cluster that was there before, workers start elsewhere, where another file may have the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMLLM_DATA", "data")
    monkeypatch.setenv("OTHER", "stays here")
    shutil.copytree(GOLDEN / "neox-tiny", "m")
    setup = WorkerSetup("./m", VARIANT, tmp_path, weights_digest("./m"), settings_for_workers())
    assert "data" not in repr(setup), "they may be secrets"
    pool = WorkerPool(setup, WorkerSettings(count=1), worker_class=Telling)
    try:
        found = answers(pool)[0].description
    finally:
        pool.shutdown()
    assert found["directory"] == str(tmp_path)
    assert found["settings"] == {"STREAMLLM_DATA": "data", "OTHER": None}


def test_files_that_are_not_the_drivers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "neox-tiny", "m")
    right = WorkerSetup("./m", VARIANT, tmp_path, weights_digest("./m"))
    monkeypatch.setattr(Worker, "_claim", lambda self: setattr(self, "cores", []) or [])
    assert Worker(right, 1, "me").load()["conditions"].model_digest == right.model_digest
    with pytest.raises(UsageError, match=r"model './m' on .* differs from the one"):
        Worker(replace(right, model_digest="0" * 64), 1, "me").load()


def test_a_node_without_the_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module.socket, "gethostname", lambda: "the driver's")
    pool = WorkerPool(WorkerSetup("./not-there", VARIANT, tmp_path), WorkerSettings(count=1))
    try:
        (finished,) = answers(pool)
    finally:
        pool.shutdown()
    assert re.fullmatch(r"on \S+: model './not-there'.*", finished.error), finished.error


@pytest.fixture
def sweep(tmp_path):
    return lambda sinks: Sweep(tmp_path, sinks)


def test_trials_that_raise_kill_and_spoil_workers(sweep):
    sweep = sweep(list(range(len(FAULTS))))
    rows = sweep.run(Faulty).rows
    assert len(rows) == len(FAULTS)
    reasons = {FAULTS[row["n_sink"]]: row["reason"] for row in rows if row["state"] == "failed"}
    assert reasons.keys() == {"raise", "kill"}
    assert reasons["raise"] == "ValueError: nope"
    assert reasons["kill"].startswith("quarantined: 2 workers ended on it: the worker died")
    assert len([note for note in sweep.notes if "starting another" in note]) == 2 + 3
    assert any("illegal memory access" in note for note in sweep.notes)
    sweep.check_going_on_changes_nothing(rows)


def test_trials_that_run_out_of_memory_or_yield_nan(sweep):
    sweep = sweep([0, 1, 2])
    rows = sweep.run(ShortOfMemory, count=1).rows
    reasons = {row["n_sink"]: row["reason"] for row in rows if row["state"] == "failed"}
    assert len(rows) == 3 and reasons.keys() == {1, 2}
    assert "allocate" in reasons[1]
    assert reasons[2].startswith("NonFiniteLossError")
    sweep.check_going_on_changes_nothing(rows, Quick)


def test_who_hangs_is_ended_and_who_waits_for_it_is_given_its_time_again(sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(pool_module, "_LOOK_SEC", 0.0)
    pool, text = sweep([0]).pool(2, Hanging, trial_timeout=1e6), tokens()
    pool.share(text)
    answers(pool, 2)
    for worker, sinks in ((1, 4), (0, 5)):
        job = Job("quality", Configuration("ours", EvictionPolicy(n_sink=sinks, window_size=8), "math"))
        pool.submit(worker, Assignment(Subject(text.digest, VARIANT, 48), job))
        silent_until(pool, (tmp_path / f"measuring {sinks}").exists)
    pool.trial_timeout = 0.01
    ended = next(pool.wait(0.1))
    assert (ended.worker, ended.died, ended.error) == (1, True, "no answer within 0.01 s")
    pool.trial_timeout = 1e6
    again = answers(pool)[0]
    assert again.worker == 1 and again.description, "another was started in its place"
    pool.shutdown()


def test_memory_of_the_accelerator(monkeypatch):
    worker = Worker(WorkerSetup("", VARIANT), 1, "me")
    emptied = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for error, becomes in ((torch.OutOfMemoryError, MemoryError), (torch.AcceleratorError, WorkerUnusableError)):

        def fail(assignment, against, error=error):
            raise error("tried to allocate")

        monkeypatch.setattr(worker, "_measure", fail)
        with pytest.raises(becomes, match="tried to allocate"):
            job = Job("speed", Configuration("ours", EvictionPolicy()))
            worker.measure(Assignment(Subject("t", VARIANT, 48), job), TEXT)
    assert emptied == [True]


def test_a_full_disk_under_the_store_ends_the_sweep_in_one_line_and_it_goes_on_later(sweep, monkeypatch):
    sweep = sweep([0, 1])

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(store_module, "write_atomically", full)
        with pytest.raises(SweepError, match=r"store .* cannot be written \(No space left.*\): make room") as raised:
            sweep.run()
    assert "\n" not in str(raised.value)
    assert not [path for path in (sweep.folder / "store").rglob("*") if path.is_file()], "nothing half-written"
    rows = sweep.run().rows
    assert sorted(row["n_sink"] for row in rows) == [0, 1]
    assert {row["state"] for row in rows} == {"complete"}
    sweep.check_going_on_changes_nothing(rows)


def test_a_damaged_store_entry_is_kept_aside_and_measured_again(sweep, tmp_path):
    sweep = sweep([0, 1])
    sweep.run()
    damaged = next(p for p in sorted(sweep.stored()) if '"method": "ours"' in p.read_text())
    damaged.write_text(damaged.read_text().replace('"time_ratio": 2.0', '"time_ratio": 0.5').replace(": 3.0", ": 0.5"))
    before = sweep.stored()
    (tmp_path / "journal.log").unlink()
    assert {row["time_ratio"] for row in sweep.run().rows} == {2.0, 3.0}
    after = sweep.stored()
    assert {path for path in after if after[path] != before[path]} == {damaged}
    assert damaged.with_suffix(".damaged").exists()


def test_workers_that_are_never_ready_end_the_sweep_with_the_reason(sweep, monkeypatch):
    sweep = sweep([0])
    monkeypatch.setattr(pool_module, "_LOOK_SEC", 0.0)
    monkeypatch.setattr(pool_module, "_LOADING_NOTE_SEC", 0.5)
    with pytest.raises(SweepError, match=r"no worker is left: not ready within 1\.5 s"):
        sweep.run(NeverReady, count=1, load_timeout=1.5)
    assert any("still loading; it has 1.5 s for it" in note for note in sweep.notes)
    with pytest.raises(SweepError, match="no worker is left: RuntimeError: no such luck"):
        sweep.run(Unwilling, count=1)


def test_what_a_pending_worker_waits_for_is_said(sweep, monkeypatch):
    sweep = sweep([0])
    monkeypatch.setattr(pool_module, "_LOOK_SEC", 0.0)
    monkeypatch.setattr(pool_module, "_PENDING_NOTE_SEC", 0.5)
    other = ray.remote(WithoutModel).options(num_cpus=2).remote(sweep.setup, 2, "other")
    ray.get(other.place.remote())
    pool = sweep.pool(1, WithoutModel)
    silent_until(pool, lambda: sweep.notes)
    (note,) = sweep.notes
    assert note.startswith("waiting for 2 CPU for each of 1 of 1 workers: the cluster has 2, of which ")
    with monkeypatch.context() as gone:
        gone.setattr(pool_module, "_PENDING_END_SEC", 0.5)
        gone.setattr(Cluster, "nodes", lambda self: [])
        with pytest.raises(SweepError, match="no worker can be started: each needs 2 CPU, and the cluster has 0"):
            answers(pool)
    ray.kill(other)
    assert answers(pool)[0].description["cores"]
    pool.shutdown()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, "workers 3: there is room for 2, each with its own core; give --workers 2 or fewer"),
        (2, {"cpus": 2}, "workers 2: there is room for 1, each with its own 2 cores"),
        (0, {"cpus": 3}, "cpus per worker 3: no node has more than 2"),
    ],
)
def test_more_than_the_cluster_has_is_refused(sweep, count, options, message):
    with pytest.raises(UsageError, match=message):
        sweep([0]).pool(count, WithoutModel, **options)


def one_node_is_left():
    """Ray notices a node's end after a while, and gives it workers until then."""
    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, 60, what="the end of added nodes")


@pytest.fixture
def faked_gpus(cluster, monkeypatch):
    """Ray on a node of its own believes in two GPUs whose numbers no machine has, so that torch never finds them;
    settings of that node's Ray are passed to it."""
    nodes = []

    def add(**settings):
        with monkeypatch.context() as faked:
            for name, value in (dict.fromkeys(HIDDEN, "") | {"CUDA_VISIBLE_DEVICES": "96,97"} | settings).items():
                faked.setenv(name, value)
            nodes.append(cluster.add_node(num_cpus=2, num_gpus=2))

    yield add
    for node in nodes:
        cluster.remove_node(node)
    one_node_is_left()


@pytest.mark.parametrize("setting", ["", "1"])
def test_each_worker_sees_its_own_accelerator(setting, sweep, faked_gpus):
    """Even where Ray was told to let all of them see all."""
    faked_gpus(RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=setting)
    pool = sweep([0]).pool(0, WithoutModel)
    ready = {answer.worker: answer.description for answer in answers(pool, 2)}
    pool.shutdown()
    assert sorted(description["visible_devices"] for description in ready.values()) == ["96", "97"]


def test_gpus_that_torch_cannot_use_are_no_sweep_on_the_cpu(sweep, faked_gpus):
    faked_gpus()
    with pytest.raises(UsageError, match=r"Ray gave a worker accelerator 9[67] .*, but torch .* can use none: "):
        sweep([0]).run(Worker, count=0)


def test_a_cluster_is_asked_what_it_is_made_of(cluster, faked_gpus, monkeypatch):
    assert device_kinds(cluster.address) == {"cpu"}, "it has no accelerators"
    faked_gpus()
    monkeypatch.setattr("orchestrator.workers.device_kinds.built_for", lambda: "cuda")  # of a torch built for CPUs
    assert device_kinds(cluster.address) == {"cuda"}


def test_workers_see_no_accelerator_of_this_machine():
    environment = ray.get(ray.remote(lambda: dict(os.environ)).options(num_cpus=0).remote())
    assert {name: environment.get(name) for name in HIDDEN} == HIDDEN


class Nodes(Log):
    """Adds a node when the first worker is there, kills it when a job has started on it."""

    def __init__(self, cluster, folder):
        super().__init__()
        self.cluster, self.folder = cluster, folder
        self.started = []
        self.hosts = {}
        """Of each worker, the node that it was on last."""

    def worker_ready(self, worker, description):
        if not self.hosts:
            self.node = self.cluster.add_node(num_cpus=1)
        self.hosts[worker] = description["node"]

    def worker_idle(self, worker):
        pass

    def job_started(self, worker, job):
        is_added = self.hosts[worker] != (self.folder / "head").read_text()
        self.started.append((worker, job.what.policy.n_sink, is_added))
        if is_added:
            self.cluster.remove_node(self.node, allow_graceful=False)
            (self.folder / "killed").touch()


def test_nodes_share_no_folder_with_the_driver(sweep, cluster, tmp_path):
    """Two nodes, real models: all that they measure is in the driver's store and nowhere else."""
    node = cluster.add_node(num_cpus=2)
    sweep, there = sweep([0, 1, 2, 3]), Described()
    try:
        rows = sweep.run(OnAnotherDisk, count=4, watcher=there).rows
    finally:
        cluster.remove_node(node)
        one_node_is_left()
    assert {row["state"] for row in rows} == {"complete"} and len(rows) == 4
    folders = {description["directory"] for description in there.descriptions}
    assert len(folders) > 1 and not [path for folder in folders for path in Path(folder).iterdir()]
    entries = {row[name] for row in rows for name in ("quality_entry", "speed_entry")}
    assert entries <= {path.stem for path in sweep.stored()}
    for row in rows:
        assert np.isfinite(MeasurementStore(tmp_path / "store").losses(row["quality_entry"])).all()


class Described:
    """Keeps what workers say of themselves."""

    def __init__(self):
        self.descriptions = []

    def worker_ready(self, worker, description):
        self.descriptions.append(description)

    def worker_idle(self, worker):
        pass

    def job_started(self, worker, job):
        pass


def test_nodes_come_and_go(sweep, cluster, tmp_path):
    sweep = sweep([0, 1, 2, 3])
    (tmp_path / "head").write_text(ray.get_runtime_context().get_node_id())
    nodes = Nodes(cluster, tmp_path)
    rows = sweep.run(OnNodes, count=0, observer=nodes, watcher=nodes).rows
    assert sorted(row["n_sink"] for row in rows) == [0, 1, 2, 3]
    assert {row["state"] for row in rows} == {"complete"}
    ((worker, lost),) = [(worker, sinks) for worker, sinks, is_added in nodes.started if is_added]
    assert (lost, False) in [(sinks, is_added) for _, sinks, is_added in nodes.started], "tried again elsewhere"
    assert any(note.startswith(f"worker {worker} on ") for note in sweep.notes)
    sweep.check_going_on_changes_nothing(rows)
