"""What every results file says about where it comes from."""

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from mixture_of_depths import __version__, provenance


def test_a_source_tree_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "mixture-of-depths":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(provenance, "version", installed)
    versions = provenance.provenance()["versions"]
    assert versions["mixture-of-depths"] == __version__
    assert versions["torch"] == version("torch")


def test_a_processor_is_named_with_its_family_and_model_where_linux_tells_them() -> None:
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        assert re.fullmatch(r".+ \(family \d+, model \d+\)", provenance.processor())
    else:
        assert provenance.processor() == (platform.processor() or platform.machine())


def test_the_commit_is_of_the_tree_of_the_source_without_its_results_and_that_of_the_first_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        return subprocess.check_output(["git", "-C", str(tmp_path), *who, *words], text=True).strip()

    source, results = tmp_path / "src" / "provenance.py", tmp_path / "results" / "records.jsonl"
    monkeypatch.setattr(provenance, "__file__", str(source))
    for file in (source, results):
        file.parent.mkdir()
        file.write_text("one")

    def told() -> str | None:
        provenance._git_commit.cache_clear()
        return provenance._git_commit()

    git("init", "--quiet")
    assert told() is None
    git("add", ".")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD")
    results.write_text("two")
    assert told() == commit
    source.write_text("two")
    assert told() == f"{commit}-dirty"
    git("commit", "--quiet", "--all", "--message", "two")
    assert provenance._git_commit() == f"{commit}-dirty"
    assert told() == git("rev-parse", "HEAD")
    provenance._git_commit.cache_clear()
