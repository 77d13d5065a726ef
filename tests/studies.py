"""A small study file for the tests of isoFLOP studies."""

from pathlib import Path
from typing import Any

import yaml

RECIPE = Path(__file__).parents[1] / "recipes" / "isoflop-cpu.yaml"


def study_file(folder: Path, **changes: Any) -> Path:
    """A tiny study of two runs, as a file; `changes` replace its top-level fields."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(f"{i} {i * i} the quick brown fox jumps over {i} lazy dogs" for i in range(400)))
        for i in range(30):
            (folder / f"part-{i}.txt").write_text(text.read_text()[i * 300 : i * 300 + 900])
    small = {"vocab_size": 300, "sequence_length": 16, "cache_dir": str(folder / "cache")}
    content: dict[str, Any] = {
        "data": {"data": [str(folder / "part-*.txt")], **small},
        "training": {"batch_size": 4},
        "ladder": {"width_per_block": 8, "width_offset": 0, "head_dim": 8},
        "families": {"baseline": {"routed": False}, "mod": {"capacity": [0.25], "route_every": 2}},
        "learning_rates": {"baseline": 1e-2, "mod": 1e-2},
        "sweeps": [{"budgets": [3e7], "families": ["baseline", "mod"], "depths": [2]}],
        **changes,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
