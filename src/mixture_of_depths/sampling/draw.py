"""The choice of the next token from its logits.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixture_of_depths.options import SamplingOptions


class TokenChoice:
    """Draws the next token of every row; each row has a generator of its own, so that its text is its own affair."""

    def __init__(
        self, options: SamplingOptions, input_ids: Tensor, attention_mask: Tensor, seeds: Sequence[int]
    ) -> None:
        # Padding repeats the row's first token: a penalty on what a row holds must not hit the padding's token.
        first_B1 = input_ids.gather(1, attention_mask.argmax(dim=1, keepdim=True))
        self.known_BT = torch.where(attention_mask.bool(), input_ids, first_B1)
        self.is_greedy = options.temperature == 0
        self.is_penalised = options.repetition_penalty != 1
        self.generators = [torch.Generator(input_ids.device).manual_seed(seed) for seed in seeds]
        self.processors = LogitsProcessorList()
        if self.is_penalised:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        if self.is_greedy:
            return
        if options.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k > 0:
            self.processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            self.processors.append(TopPLogitsWarper(float(options.top_p)))
        if options.min_p > 0:
            self.processors.append(MinPLogitsWarper(options.min_p))

    def __call__(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens, which it remembers, and whether they come of finite logits; both of shape [B]."""
        logits_BV = self.processors(cast(torch.LongTensor, self.known_BT), cast(torch.FloatTensor, logits_BV))
        largest_B, token_B = logits_BV.max(dim=-1)
        if not self.is_greedy:
            token_B = draw(logits_BV, self.generators)
        if self.is_penalised:
            self.known_BT = torch.cat([self.known_BT, token_B[:, None]], dim=1)
        return token_B, largest_B.isfinite()


def draw(logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, of shape [B], by the softmax of its logits; each row from a generator of its own.

    It looks up where a uniform number falls among the cumulative probabilities: for one row of 49,152 tokens in a
    seventh of the time of `torch.multinomial`, which draws a number for every token.
    """
    upto_BV = logits_BV.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    # Above 0 and up to 1, so that no token of probability 0 is found.
    numbers = [1 - torch.rand(1, generator=one, dtype=torch.float64, device=logits_BV.device) for one in generators]
    return torch.searchsorted(upto_BV, torch.stack(numbers) * upto_BV[:, -1:])[:, 0]
