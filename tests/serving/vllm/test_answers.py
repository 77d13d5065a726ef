"""vLLM's answers are those of the package's own causal pass, whatever vLLM does with the requests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm_engines import asked, check, engine, greedy, preemptions, prompts_of, save, small_model

KINDS: dict[str, dict[str, Any]] = {
    "block": {"routed_parts": "block"},
    "keys kept": {"routed_parts": "block_keep_keys"},
    "mlp": {"routed_parts": "mlp"},
    "every kind, with bypasses": {"routed_parts": ["block", "block_keep_keys", "mlp"], "bypass_rank": 4},
    "predictor, first token enters": {"causal_router": "predictor", "first_token_enters": True},
    "auxiliary loss, straight-through": {"causal_router": "auxiliary_loss", "router_activation": "straight_through"},
    "random": {"router_type": "random"},
    "norms of queries and keys, biases, tied": {
        "routed_parts": ["block", "block_keep_keys", "mlp"],
        "query_key_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "scaled positions": {
        "routed_parts": ["block", "block_keep_keys", "mlp"],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
    "widths that are no whole vectors": {
        "routed_parts": ["block", "block_keep_keys", "mlp"],
        "hidden_size": 68,
        "intermediate_size": 100,
        "head_dim": 32,
    },
    "dense": {"routed_layers": []},
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_requests_of_mixed_lengths_are_the_package_s(kind: str, tmp_path: Path) -> None:
    model = small_model(**KINDS[kind])
    llm = engine(save(model, tmp_path / "model"), max_num_batched_tokens=96, max_num_seqs=8)
    prompts = prompts_of([1, 2, 31, 32, 33, 150, 7, 64, 300, 5, 90])
    check(model, asked(llm, prompts, [greedy(new) for new in (40, 1, 2, 70, 33, 5, 64, 10, 3, 80, 17)]))


@pytest.mark.parametrize("parts", ["block", "block_keep_keys", "mlp"])
def test_many_requests_at_once_in_a_cache_too_small_for_them_are_answered_like_one(parts: str, tmp_path: Path) -> None:
    model = small_model(routed_parts=parts, bypass_rank=4)
    # A cache of 2,048 tokens: one of the longest requests, and little else.
    llm = engine(
        save(model, tmp_path / "model"), max_num_batched_tokens=256, max_num_seqs=32, num_gpu_blocks_override=65
    )
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 1500, *(int(1500 ** float(power)) for power in torch.rand(62, generator=generator))]
    news = [200, 1, *torch.randint(1, 201, (62,), generator=generator).tolist()]
    check(model, asked(llm, prompts_of(lengths), [greedy(new) for new in news]))
    assert preemptions(llm) > 0


def test_several_samples_of_one_prompt_are_each_right(tmp_path: Path) -> None:
    model = small_model(routed_parts=["block", "block_keep_keys", "mlp"], bypass_rank=4)
    llm = engine(save(model, tmp_path / "model"), max_num_seqs=8)
    sampling = SamplingParams(
        n=4, temperature=1.5, max_tokens=40, ignore_eos=True, detokenize=False, logprobs=1, seed=3
    )
    answers = asked(llm, prompts_of([50, 3]), sampling)
    assert len({tuple(completion.token_ids) for answer in answers for completion in answer.outputs}) == 8
    check(model, answers, is_greedy=False)


def test_requests_that_others_are_aborted_beside_are_right(tmp_path: Path) -> None:
    model = small_model(routed_parts=["block", "block_keep_keys", "mlp"], bypass_rank=4)
    llm = engine(
        save(model, tmp_path / "model"),
        max_num_batched_tokens=64,
        max_num_seqs=6,
        max_model_len=320,
        num_gpu_blocks_override=17,
    )
    prompts = prompts_of([100, 40, 7, 130, 64, 33, 90, 5, 200, 20, 31, 77])
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy(60))
    answers, steps = [], 0
    while llm.llm_engine.has_unfinished_requests():
        answers += [answer for answer in llm.llm_engine.step() if answer.finished]
        steps += 1
        if steps % 5 == 0 and steps <= 30:
            # Some of them wait, some are in the midst of their prompt, some of their answer.
            llm.llm_engine.abort_request([str(steps // 5 * 2 - 1)])
    finished = {answer.request_id.split("-")[0] for answer in answers}
    assert {"0", "2", "4", "6", "8", "10"} <= finished
    assert len(finished) < len(prompts)
    check(model, answers)


def test_an_engine_answers_later_requests_like_the_first(tmp_path: Path) -> None:
    model = small_model(routed_parts="block")
    llm = engine(save(model, tmp_path / "model"), max_num_seqs=4, max_model_len=320, num_gpu_blocks_override=17)
    prompts = prompts_of([90, 33, 5, 200, 61])
    first = asked(llm, prompts, greedy(50))
    check(model, first)
    for _ in range(3):
        # Pages come back in another order.
        again = asked(llm, prompts[::-1], greedy(50))[::-1]
        assert [one.outputs[0].token_ids for one in again] == [one.outputs[0].token_ids for one in first]


def test_a_prefix_that_is_cached_gives_the_same_answers(tmp_path: Path) -> None:
    model = small_model(routed_parts=["block_keep_keys", "mlp", "block_keep_keys"], bypass_rank=4)
    llm = engine(save(model, tmp_path / "model"), enable_prefix_caching=True)
    shared = prompts_of([130])[0]
    prompts = [shared + more for more in prompts_of([1, 9, 40], seed=1)]
    for prompt in [*prompts, shared]:
        check(model, asked(llm, [prompt], greedy(20)))
    (hits,) = [metric for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
    assert hits.value > 0


@pytest.mark.parametrize("kind", ["block", "keys kept", "mlp", "norms of queries and keys, biases, tied"])
def test_compiled_answers_are_the_package_s(kind: str, tmp_path: Path) -> None:
    model = small_model(**KINDS[kind], bypass_rank=4, first_token_enters=kind == "mlp")
    llm = engine(save(model, tmp_path / "model"), enforce_eager=False, max_num_batched_tokens=96, max_num_seqs=8)
    check(model, asked(llm, prompts_of([1, 33, 150, 64, 7]), greedy(40)))


def test_in_bf16_nearly_all_tokens_are_those_of_the_package_in_bf16(tmp_path: Path) -> None:
    model = small_model(routed_parts=["block", "block_keep_keys", "mlp"], bypass_rank=4).bfloat16()
    llm = engine(save(model, tmp_path / "model"), dtype="bfloat16", max_num_seqs=4)
    same = total = 0
    for answer in asked(llm, prompts_of([50, 3, 90, 20]), greedy(40)):
        made = torch.tensor(answer.outputs[0].token_ids)
        tokens = torch.tensor([*answer.prompt_token_ids, *made.tolist()])[None]
        logits = model(tokens, routing="causal", use_cache=False).logits[0, len(answer.prompt_token_ids) - 1 : -1]
        same, total = same + int((logits.argmax(dim=1) == made).sum()), total + len(made)
    assert same / total > 0.9


def test_two_processes_that_share_each_product_give_the_same_answers(tmp_path: Path) -> None:
    model = small_model(routed_parts=["block", "block_keep_keys", "mlp"], bypass_rank=4)
    llm = engine(save(model, tmp_path / "model"), tensor_parallel_size=2, max_num_batched_tokens=96, max_num_seqs=8)
    check(model, asked(llm, prompts_of([1, 33, 150, 64, 7]), greedy(40)))
