"""What a run records while it trains."""

from pathlib import Path

from runs import QUIET, config_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.run import train


def test_tensorboard_shows_losses_shares_weights_and_the_routing_map(corpus: Corpus, tmp_path: Path) -> None:
    train(config_for(corpus), corpus, TrainOptions(max_steps=4, batch_size=4, eval_every=2), tmp_path, console=QUIET)
    seen = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    seen.Reload()
    scalars = ("train/loss", "eval/loss_causal", "eval/loss_top_k", "eval/causal_accuracy", "eval/share_entering_1")
    assert set(scalars) <= set(seen.Tags()["scalars"])
    assert seen.Tags()["histograms"] == ["router_weight/1"]
    assert [image.step for image in seen.Images("routing")] == [2, 4]
    assert (seen.Images("routing")[0].width, seen.Images("routing")[0].height) == (16, 8)
