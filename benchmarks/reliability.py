"""What the reliability benchmarks found, in one file.

    python benchmarks/reliability.py        # writes results/reliability/summary.json

Reads what `kills.py`, `bad_inputs.py`, `distributed.py`, `memory.py` and `serving_load.py` wrote to
`results/reliability/`. Every figure has the command that measures it anew.
"""

import json
from pathlib import Path

from mixture_of_depths.files import read_json
from mixture_of_depths.provenance import provenance

RESULTS = Path(__file__).parent.parent / "results" / "reliability"
# Of each file: the command that makes it, and the figures taken from it.
SOURCES = {
    "kills": ("python benchmarks/kills.py", ("kills_survived", "kills_total", "resume_bit_exact")),
    "bad-inputs": ("python benchmarks/bad_inputs.py", ("bad_inputs_tried", "tracebacks_seen")),
    "distributed": (
        "python benchmarks/distributed.py > results/reliability/distributed.json",
        ("fsdp_max_loss_difference",),
    ),
    "memory": ("OMP_NUM_THREADS=1 python benchmarks/memory.py", ("rss_growth_mb",)),
    "serving": (
        "python benchmarks/serving_load.py",
        ("clients_killed", "answers", "wrong_answers", "unanswered", "serves_afterwards"),
    ),
}


def main() -> None:
    summary, commands = {}, {}
    for name, (command, figures) in SOURCES.items():
        measured = read_json(RESULTS / f"{name}.json")
        for figure in figures:
            summary[figure] = measured[figure]
            commands[figure] = f"{command}  # at {measured['git_commit']}"
    record = {**summary, "commands": commands, **provenance()}
    (RESULTS / "summary.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
