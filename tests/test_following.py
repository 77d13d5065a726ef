"""Whatever takes a model computes on its device, and a training step waits for it before the first block only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES = (
    "training step",
    "training step, random routing",
    "training step, threshold and first token",
    "training step, experts",
    "training step, fused documents",
    "stream, greedy",
    "stream, drawn",
    "stream, experts",
    "stream, int8",
    "prefill",
    "prefill, experts",
    "stream, two tokens",
    "generate()",
    "calibrate, evaluate",
    "calibrate, evaluate, experts",
    "retrofit",
    "sample_texts, trace",
)
# Is there padding, or more than one document? Once a pass.
BEFORE_THE_BLOCKS = {"model/packed.py:documents_of", "model/modeling.py:_place"}


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `pretended_device.py` prints."""
    program = Path(__file__).with_name("pretended_device.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parent), *sys.path])}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Behind the bar of what is measured.
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def results(printed: dict[str, Any]) -> dict[str, Any]:
    return printed["cases"]


def test_loading_the_package_wakes_no_gpu(printed: dict[str, Any]) -> None:
    """The program ends with an error where one is woken."""
    rooms = {"cli.main", "demo", "isoflop.measure", "retrofitting.tune"}
    assert {f"mixture_of_depths.{name}" for name in rooms} <= set(printed["loaded"])


def test_kernels_for_cuda_devices_are_not_loaded_for_another(printed: dict[str, Any]) -> None:
    assert printed["kernels"] == []


def test_the_device_refuses_to_be_mixed_with_the_cpu(results: dict[str, Any]) -> None:
    assert results.keys() == {*CASES, "a mixture"}
    assert "mixes tensors of the device with some of the CPU" in results["a mixture"]["error"]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_on_the_device_of_the_model(results: dict[str, Any], case: str) -> None:
    assert results[case]["error"] is None, results[case]["error"]


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("training step")])
def test_a_training_step_waits_for_the_device_before_the_first_block_only(results: dict[str, Any], case: str) -> None:
    # Two passes: one over packed documents, one over padded rows.
    assert results[case]["waits"] == dict.fromkeys(BEFORE_THE_BLOCKS, 1)


@pytest.mark.parametrize("case", ["prefill", "prefill, experts"])
def test_a_causal_prefill_waits_once_a_routed_block(results: dict[str, Any], case: str) -> None:
    waits = {place: count for place, count in results[case]["waits"].items() if place != "model/experts.py:_segments"}
    assert waits == {"model/routing.py:select_entered": 2}


def test_a_token_is_waited_for_once_and_once_or_twice_a_routed_block(results: dict[str, Any]) -> None:
    # Which tokens enter, in the prefill and in the pass, and how many each row of the cache holds then; the prompts are
    # looked at before, and both tokens handed out.
    assert results["stream, two tokens"]["waits"] == {
        "sampling/stream.py:check_prompts": 2,
        "model/routing.py:select_entered": 4,
        "model/cache.py:_compact": 2,
        "sampling/stream.py:stream": 2,
    }
