"""The package as it is imported: its public names, what it loads, and what it makes known to transformers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny

import mixture_of_depths

PACKAGE = Path(mixture_of_depths.__file__).parent
# From the bottom up; those of one line are side by side.
FLOORS = (
    ("fields", "files", "device", "registration", "compiler"),
    ("provenance", "distributed"),
    ("options",),
    ("model",),
    ("text",),
    ("sampling", "evaluation", "inspect"),
    ("training",),
    ("serving", "retrofitting"),
    ("isoflop",),
    ("demo",),
    ("cli",),
    ("__main__", "__init__"),
)


def printed(program: str) -> str:
    """What a program prints in a process of its own."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_every_public_name_is_there() -> None:
    # The stub that lists the names does not list itself.
    names = vars(mixture_of_depths)["__all__"]
    assert {"MoDConfig", "MoDForCausalLM", "stream", "calibrate", "retrofit", "trace"} <= set(names)
    assert all(getattr(mixture_of_depths, name) is not None for name in names)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, mixture_of_depths; print({'torch', 'transformers'} & sys.modules.keys())"
    assert printed(program) == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "import mixture_of_depths, transformers",
        "import transformers, mixture_of_depths",
        pytest.param(
            "from transformers import AutoConfig, AutoModelForCausalLM; import mixture_of_depths, transformers",
            marks=pytest.mark.slow,
        ),
        pytest.param("from mixture_of_depths import MoDModel; import transformers", marks=pytest.mark.slow),
    ],
)
def test_importing_the_package_makes_the_model_known_to_transformers(imports: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    loaded = f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    kind = f"transformers.AutoConfig.from_pretrained({str(tmp_path)!r}).model_type"
    assert printed(f"{imports}; print(type({loaded}).__name__, {kind})") == "MoDForCausalLM mixture_of_depths"


def test_no_room_imports_from_one_that_stands_above_it_or_beside_it() -> None:
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            # The public names are everyone's but the rooms', which import from where a thing lies.
            if isinstance(node, ast.ImportFrom) and node.module == "mixture_of_depths":
                assert [name.name for name in node.names] == ["__version__"], path
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("mixture_of_depths") for name in node.names), path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixture_of_depths."):
                other = (node.module or "").split(".")[1]
                assert other == room or floor_of[other] < floor_of[room], f"{path} imports {node.module}"


def test_every_public_name_stands_on_the_page_of_the_python_api() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: mixture_of_depths\.(\w+)$", page, re.MULTILINE)) == sorted(
        vars(mixture_of_depths)["__all__"]
    )
