"""A text's tokens as a model is given them, and the text that each token adds."""

from collections.abc import Sequence
from typing import cast

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
    character that begins in the prompt and ends in the tokens is new. The bytes of one character may be spread over
    several tokens; it comes with the last of them.

    Args:
        tokenizer: the model's tokenizer.
        prompt: the prompt's tokens.
        special: whether special tokens have a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], special: bool = False) -> None:
        self.backend = cast(TokenizersBackend, tokenizer).backend_tokenizer
        self.special = special
        # Tokens whose text is told, which that of the next may depend on, and tokens of which all is not told yet: of a
        # prompt those at its end that may be the beginning of a character.
        whole, bytes_left = len(prompt), 3
        while whole > 0 and bytes_left > 0 and self._is_broken(prompt[:whole]):
            whole -= 1
            # A special token between them has no text.
            bytes_left -= self._decode(prompt[whole : whole + 1]) != ""
        if self._is_broken(prompt[:whole]):
            whole = len(prompt)
        self.before, self.after = prompt[:whole], prompt[whole:]
        self.text_before = self._decode(self.before)
        self.told = self._text()

    def step(self, token: int) -> str:
        """The text that the next token adds."""
        self.after.append(token)
        text = self._text()
        # What may be the beginning of a character.
        whole = text.rstrip("\ufffd")
        shared = _shared(self.told, text)
        added, self.told = whole[shared:], text[: max(shared, len(whole))]
        if text and text == whole:
            # Bytes that end a character are nothing without those before them.
            is_whole = self._decode(self.after).count("\ufffd") <= text.count("\ufffd")
            self.before, self.after, self.told = [*([] if is_whole else self.before), *self.after], [], ""
            self.text_before = self._decode(self.before)
        return added

    def rest(self) -> str:
        """What is not told, since the tokens break off inside a character."""
        return self._text()[len(self.told) :]

    def _text(self) -> str:
        """The text of the tokens that are not told, all of it."""
        text = self._decode([*self.before, *self.after])
        shared = _shared(self.text_before, text)
        if shared < len(self.text_before.rstrip("\ufffd")):
            # A byte that is none of a character may change how those before it are read, which are told already.
            return self._decode(self.after)
        return text[shared:]

    def _is_broken(self, tokens: list[int]) -> bool:
        return self._decode(tokens).endswith("\ufffd")

    def _decode(self, tokens: list[int]) -> str:
        return self.backend.decode(tokens, skip_special_tokens=not self.special)


def _shared(first: str, second: str) -> int:
    """The length of the beginning that two texts have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text each token adds; the bytes of one character may be spread over several, and come with the last."""
    new_text = NewText(tokenizer, [], special=True)
    texts = [new_text.step(token) for token in tokens]
    if texts:
        texts[-1] += new_text.rest()
    return texts
