"""The property tests of bad input with many cases: how many were tried, and how many would have shown a traceback.

    python benchmarks/bad_inputs.py        # writes results/reliability/bad-inputs.json

Runs `tests/test_bad_input.py`: configurations, command lines, files of text, damaged checkpoints, sources, runs and
tokenizers. `bad_inputs_tried` counts the cases, `tracebacks_seen` the kinds of them in which one was neither taken nor
refused with a reason; pytest prints the case.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixture_of_depths.provenance import provenance

ROOT = Path(__file__).parent.parent


class Counts:
    """Of one run of pytest: how many tests failed, and by kind the cases that they tried."""

    failed = 0
    tried: Counter[str]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        module: Any = session.items[0].getparent(pytest.Module)
        self.tried = module.obj.TRIED

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="of each kind")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reliability" / "bad-inputs.json")
    arguments = parser.parse_args()
    os.environ["BAD_INPUT_CASES"] = str(arguments.cases)
    counts = Counts()
    # In this process, where the cases are then counted.
    pytest.main(["-q", "-n", "0", str(ROOT / "tests" / "test_bad_input.py")], plugins=[counts])
    record = {
        "benchmark": "bad_inputs",
        "bad_inputs_tried": sum(counts.tried.values()),
        "tracebacks_seen": counts.failed,
        "by_kind": dict(counts.tried),
        **provenance(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
