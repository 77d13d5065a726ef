"""A text's tokens as a model is given them, and the text that each token adds."""

from collections.abc import Sequence
from typing import cast

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from mixture_of_depths.text.tokenizer import start_of_text


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str, special: bool) -> list[list[int]]:
    """The tokens of each text, as they are given to a model.

    Args:
        tokenizer: the model's tokenizer.
        texts: texts.
        name: what the user calls one of them.
        special: whether the name of a special token stands for it, as a chat's prompt needs, or for its characters, as
            in text that is trained on.

    Raises:
        ValueError: for a text that is empty or not UTF-8.
    """
    tokens_of_texts, start = [], start_of_text(tokenizer)
    for text in texts:
        if not text:
            raise ValueError(f"{name}='' is empty; give at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}={text!r} is not UTF-8: {error}") from error
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
        ids = cast(list[int], encoded["input_ids"])
        # The prompt of a chat has it already.
        tokens_of_texts.append(ids if ids[:1] == start else start + ids)
    return tokens_of_texts


class NewText:
    """The text that tokens add to a prompt, told token by token.

    It is the text of the prompt and the tokens, without the beginning that it shares with the prompt's own text. So a
    character that begins in the prompt and ends in the tokens is new.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the prompt's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> None:
        self.backend = cast(TokenizersBackend, tokenizer).backend_tokenizer
        self.decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        text = self.backend.decode(prompt, skip_special_tokens=True)
        # A text with this end may break off inside a character; the library then tells the prompt's text again.
        self.told_again = text if text.endswith("\ufffd") else ""

    def step(self, token: int) -> str:
        """The text that the next token adds; the bytes of one character may be spread over several tokens."""
        text = self.decoder.step(self.backend, token) or ""
        if not text:
            return ""
        shared = len(self.told_again.rstrip("\ufffd"))
        while shared < len(self.told_again) and text.startswith("\ufffd", shared):
            shared += 1
        self.told_again = ""
        return text[shared:]


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text each token adds; the bytes of one character may be spread over several, and come with the last."""
    decoder, backend = DecodeStream(skip_special_tokens=False), cast(TokenizersBackend, tokenizer).backend_tokenizer
    texts = [decoder.step(backend, token) or "" for token in tokens]
    # A character that the tokens break off.
    waiting = next((i + 1 for i in reversed(range(len(texts))) if texts[i]), 0)
    if waiting < len(tokens):
        rest = tokenizer.decode(tokens[waiting:], skip_special_tokens=False)
        assert isinstance(rest, str)
        texts[-1] = rest
    return texts
