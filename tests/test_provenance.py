"""What every results file says about where it comes from."""

import platform
import re
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
