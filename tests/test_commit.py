"""The commit that a study and its rows name: of this project's own checkout, and whether that was changed."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

import streamllm
from orchestrator import configuration

VERSION = f"streamllm-sweep {streamllm.__version__}"


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    found = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return found.stdout.strip()


def project(folder):
    """A checkout with two packages."""
    for package in ("streamllm", "orchestrator"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("VALUE = 1\n")
    (folder / "README.md").write_text("read me\n")


@pytest.fixture
def commit_of(monkeypatch):
    def commit_of(folder):
        package = SimpleNamespace(__file__=str(folder / "streamllm" / "__init__.py"), __version__=streamllm.__version__)
        monkeypatch.setattr(configuration, "streamllm", package)
        return configuration.commit.__wrapped__()

    return commit_of


@pytest.fixture
def checkout(tmp_path):
    project(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_commit_of_a_clean_checkout(checkout, commit_of, monkeypatch):
    assert commit_of(checkout) == git(checkout, "rev-parse", "HEAD")
    (checkout / "sweeps").mkdir()
    (checkout / "sweeps" / "notes.txt").write_text("results are no change of the code")
    assert commit_of(checkout) == git(checkout, "rev-parse", "HEAD")
    elsewhere = checkout.parent / f"{checkout.name} elsewhere"
    shutil.copytree(checkout, elsewhere)
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(elsewhere / ".git"))
    assert commit_of(checkout) == head


@pytest.mark.parametrize(
    ("file", "staged"),
    [
        ("streamllm/__init__.py", False),
        ("README.md", True),
        ("orchestrator/new.py", False),
        ("orchestrator/new.py", True),
    ],
)
def test_a_changed_tree_is_dirty(checkout, commit_of, file, staged):
    (checkout / file).write_text("changed\n")
    if staged:
        git(checkout, "add", ".")
    assert commit_of(checkout) == f"{git(checkout, 'rev-parse', 'HEAD')}+dirty"


def test_a_repository_that_is_not_ours_is_never_named(checkout, commit_of, tmp_path):
    """One that holds the environment, ignored or not; one that holds the project in a folder; one without a commit."""
    installed = checkout / ".venv" / "lib"
    project(installed)
    assert commit_of(installed) == VERSION
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "an environment")
    assert commit_of(installed) == VERSION
    fresh = tmp_path / "fresh"
    project(fresh)
    git(fresh, "init")
    assert commit_of(fresh) == VERSION
    git(fresh, "add", "README.md")
    git(fresh, "commit", "-m", "a home folder with our files in it")
    assert commit_of(fresh) == VERSION


def test_without_git_it_is_the_version(checkout, commit_of, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert commit_of(checkout) == VERSION
