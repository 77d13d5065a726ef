"""What does not go together with skipped tokens is refused by name, or switched off."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import asked, engine, greedy, prompts_of, save, small_model

from mixture_of_depths.serving.vllm import limits

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_experts": 4, "routed_layers": []}, {}, "num_experts=4"),
    ({}, {"enable_lora": True}, "enable_lora=True"),
    ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative_config"),
    (
        {},
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "kv_transfer_config",
    ),
    ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    ({}, {"kv_offloading_size": 0.1}, "kv_offloading_size=0.1"),
    (
        {"routed_parts": "block_keep_keys"},
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "kv_transfer_config=ExampleConnector",
    ),
    ({}, {"ubatch_size": 2}, "ubatch_size"),
    ({"routed_parts": "block_keep_keys"}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
    (
        {"routed_parts": "block_keep_keys", "num_key_value_heads": 1},
        {"tensor_parallel_size": 2},
        "tensor_parallel_size=2 does not divide num_key_value_heads=1",
    ),
]


@pytest.mark.parametrize(("fields", "settings", "name"), REFUSED, ids=[name for _, _, name in REFUSED])
def test_a_setting_that_cannot_be_right_is_refused_by_name(
    fields: dict[str, Any], settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    folder = save(small_model(**fields), tmp_path / "model")
    with pytest.raises(ValueError, match=name):
        engine(folder, **settings)


def test_prefix_caching_is_off_where_keys_of_skipped_tokens_are_dropped(tmp_path: Path) -> None:
    llm = engine(save(small_model(), tmp_path / "model"), enable_prefix_caching=True)
    prompts = prompts_of([130]) * 2
    first, second = asked(llm, prompts, greedy(20))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching


def test_what_vllm_has_compiled_is_not_taken_once_the_files_of_the_plugin_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(small_model(), tmp_path / "model")
    sources = shutil.copytree(Path(limits.__file__).parent, tmp_path / "sources")
    monkeypatch.setattr(limits, "__file__", str(sources / "limits.py"))
    keys = []
    for change in ("", "", "\n# another line"):
        with (sources / "model.py").open("a") as file:
            file.write(change)
        keys.append(engine(folder, additional_config={"other": 1}).llm_engine.vllm_config.compute_hash())
    assert keys[0] == keys[1] != keys[2]
