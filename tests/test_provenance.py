"""What every results file says about where it comes from."""

from importlib.metadata import PackageNotFoundError, version

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
