"""Text from a model: stop strings, streams, prompts of different lengths."""

import copy
from typing import Any

import pytest
import torch
from models import SENTENCE, greedy

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import Sample, begin, sample_texts, step_texts, stream_texts
from mixture_of_depths.text.tokenizer import train_tokenizer

PROMPTS = ["A", "The router decides which of the tokens", "é world"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([SENTENCE * 3, "wörld é"], 300)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> MoDForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return MoDForCausalLM(MoDConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3)).eval()


def test_streamed_pieces_join_to_the_sample_s_text(model: MoDForCausalLM, tokenizer: Any) -> None:
    samples = begin(tokenizer, PROMPTS)
    joined = ["", "", ""]
    for row, text in stream_texts(model, tokenizer, samples, SamplingOptions(max_new_tokens=30)):
        assert text
        joined[row] += text
    assert joined == [sample.text for sample in samples]
    for sample in samples:
        new = sample.tokens[len(tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]) :]
        assert sample.ended == "length"
        assert len(new) == 30
        # Bytes that have not become a character at the end are left out.
        assert tokenizer.decode(new, skip_special_tokens=True).rstrip("�").startswith(sample.text)


def test_a_prompt_s_sample_does_not_depend_on_what_it_is_batched_with(model: MoDForCausalLM, tokenizer: Any) -> None:
    options = SamplingOptions(max_new_tokens=25, repetition_penalty=1.3, top_p=0.9, min_p=0.01)
    model = copy.deepcopy(model).double()
    together = sample_texts(model, tokenizer, PROMPTS, options, seeds=[5, 6, 7])
    for prompt, seed, sample in zip(PROMPTS, [5, 6, 7], together, strict=True):
        (alone,) = sample_texts(model, tokenizer, [prompt], options, seeds=[seed])
        assert alone.tokens == sample.tokens


@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_stop_string_over_several_tokens_ends_its_row_and_is_neither_streamed_nor_kept(
    model: MoDForCausalLM, tokenizer: Any, length: int
) -> None:
    whole = sample_texts(model, tokenizer, PROMPTS, SamplingOptions(max_new_tokens=40, seed=9))
    stop = whole[0].text[5 : 5 + length]
    options = SamplingOptions(max_new_tokens=40, seed=9, stop=("never there", stop))
    stopped, streamed = begin(tokenizer, PROMPTS), ["", "", ""]
    for row, text in stream_texts(model, tokenizer, stopped, options):
        streamed[row] += text
    assert streamed == [sample.text for sample in stopped]
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.ended == ("stop" if stop in before.text else "length")
    assert stopped[0].ended == "stop"
    new = stopped[0].tokens[len(begin(tokenizer, PROMPTS)[0].tokens) :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert text.startswith(stopped[0].text)
    assert stop not in text
    # Of the tokens, as many are kept as the text needs.
    assert len(tokenizer.decode(new[:-1], skip_special_tokens=True)) < len(stopped[0].text)


def test_text_that_only_begins_like_a_stop_string_comes_out_in_the_end(model: MoDForCausalLM, tokenizer: Any) -> None:
    (whole,) = sample_texts(model, tokenizer, ["A"], SamplingOptions(max_new_tokens=30))
    held = SamplingOptions(max_new_tokens=30, stop=(whole.text[-4:] + "\x00",))
    samples = begin(tokenizer, ["A"])
    assert "".join(text for _, text in stream_texts(model, tokenizer, samples, held)) == whole.text


def test_the_end_of_text_ends_a_sample(model: MoDForCausalLM, tokenizer: Any) -> None:
    options = SamplingOptions(max_new_tokens=400, temperature=2.0, top_k=0)
    (sample,) = sample_texts(model, tokenizer, ["A"], options)
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = end = sample.tokens[20]
    (ended,) = sample_texts(model, tokenizer, ["A"], options)
    assert ended.ended == "end_of_text"
    assert ended.tokens == sample.tokens[: sample.tokens.index(end, 1) + 1]


def test_an_empty_prompt_among_others_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompt='' is empty"):
        begin(tokenizer, ["a", ""])


def test_steps_come_once_a_token_and_count_those_of_the_stop_string(model: MoDForCausalLM, tokenizer: Any) -> None:
    prompt = len(begin(tokenizer, ["A"])[0].tokens)
    (whole,) = sample_texts(model, tokenizer, ["A"], SamplingOptions(max_new_tokens=30))
    assert whole.new_tokens == 30
    # Without the sign of a broken character, which also stands for one that has not come whole.
    pairs = (whole.text[place : place + 2] for place in range(4, len(whole.text) - 1))
    stop = next(pair for pair in pairs if "\ufffd" not in pair)
    samples = begin(tokenizer, ["A"])
    steps = list(step_texts(model, tokenizer, samples, SamplingOptions(max_new_tokens=30, stop=(stop,))))
    assert "".join(text for texts in steps for _, text in texts) == whole.text[: whole.text.index(stop)]
    texts = [tokenizer.decode(whole.tokens[prompt : prompt + count]) for count in range(31)]
    assert samples[0].new_tokens == next(count for count in range(31) if stop in texts[count])
    # One more for what is held back at the end.
    assert len(steps) == samples[0].new_tokens + 1


@pytest.mark.parametrize("prompt", ["the tokens\ufffd", "\ufffd\ufffd", "the ü"])
def test_the_prompt_s_broken_end_is_not_told_again(model: MoDForCausalLM, tokenizer: Any, prompt: str) -> None:
    model, ids = copy.deepcopy(model).double(), tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # The last prompt breaks off inside its last character.
    tokens = ids[:-1] if prompt == "the ü" else ids
    before = tokenizer.decode(tokens)
    assert before.endswith("\ufffd")
    input_ids = torch.tensor([tokens])
    new = greedy(model, input_ids, torch.ones_like(input_ids), 40)[0].tolist()
    expected = tokenizer.decode(tokens + new, skip_special_tokens=True).removeprefix(before).rstrip("\ufffd")
    assert len(expected) > 8
    for stop in ((), (prompt[:3],), (expected[4:7],)):
        sample, streamed = Sample(prompt, "", list(tokens)), ""
        options = SamplingOptions(max_new_tokens=40, temperature=0, stop=stop)
        for _, text in stream_texts(model, tokenizer, [sample], options):
            streamed += text
        ends = [expected.index(string) for string in stop if string in expected]
        assert sample.text == streamed == expected[: min(ends, default=None)]
        assert sample.ended == ("stop" if ends else "length")


def test_the_tokens_before_a_stop_string_keep_the_last_character_whole(
    model: MoDForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,), new = tokenizer("A")["input_ids"], tokenizer("ü.", add_special_tokens=False)["input_ids"]
    assert len(new) == 3
    monkeypatch.setattr("mixture_of_depths.sampling.texts.stream", lambda *_: (torch.tensor([token]) for token in new))
    (sample,) = sample_texts(model, tokenizer, ["A"], SamplingOptions(stop=(".",)))
    assert (sample.text, sample.tokens[1:]) == ("ü", new[:2])
    assert sample.tokens[0] == before
