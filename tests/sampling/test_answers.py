"""A model answers every message of the user's that has no answer, each as it would alone."""

from models import TEMPLATE, TOKENIZER, model_with

from mixture_of_depths import SamplingOptions, sample_texts
from mixture_of_depths.sampling.answers import answered

OPTIONS = SamplingOptions(max_new_tokens=5, temperature=0, top_k=0)


def test_every_question_without_an_answer_gets_the_models_own() -> None:
    tokenizer, model = TOKENIZER, model_with()
    tokenizer.chat_template = TEMPLATE
    first, second = ({"role": "user", "content": text} for text in ("the quick", "lazy dog"))
    known = {"role": "assistant", "content": "brown fox"}
    system = {"role": "system", "content": "jumps"}
    found = answered(model, tokenizer, [[first, second], [system, first, known, second], [first, known]], OPTIONS)

    def said(messages: list[dict[str, str]]) -> dict[str, str]:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        (sample,) = sample_texts(model, tokenizer, [prompt], OPTIONS)
        return {"role": "assistant", "content": sample.text.strip()}

    answer = said([first])
    assert found[0].messages == [first, answer, second, said([first, answer, second])]
    assert found[1].messages == [system, first, known, second, said([system, first, known, second])]
    assert found[2].messages == [first, known]
