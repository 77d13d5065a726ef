"""What a run records while it trains."""

from pathlib import Path
from typing import Any

import pytest
from runs import QUIET, config_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.run import train


@pytest.mark.parametrize(
    ("activation", "histogram"), [("sigmoid", "router_weight/1"), ("straight_through", "causal_logit/1")]
)
def test_tensorboard_shows_losses_shares_what_routers_say_and_the_routing_map(
    corpus: Corpus, tmp_path: Path, activation: Any, histogram: str
) -> None:
    options = TrainOptions(max_steps=4, batch_size=4, eval_every=2)
    train(config_for(corpus, router_activation=activation), corpus, options, tmp_path, console=QUIET)
    seen = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    seen.Reload()
    scalars = ("train/loss", "eval/loss_causal", "eval/loss_top_k", "eval/causal_accuracy", "eval/share_entering_1")
    assert set(scalars) <= set(seen.Tags()["scalars"])
    assert seen.Tags()["histograms"] == [histogram]
    assert [image.step for image in seen.Images("routing")] == [2, 4]
    assert (seen.Images("routing")[0].width, seen.Images("routing")[0].height) == (16, 8)
