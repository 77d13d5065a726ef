"""Sampling speed: this package's Mixture-of-Depths and dense models against transformers' Llama and llama.cpp.

    pip install -e '.[bench]'
    python benchmarks/decode.py                                  # models A and B, both precisions, batch 1, 4, 16
    python benchmarks/decode.py --models A --precisions fp32 --batch-sizes 1
    python benchmarks/decode.py --models S --batch-sizes 1 --others graph

A: d 512, 8 blocks, 8 heads, SwiGLU 1408. B: d 1024, 16 blocks, 16 heads, SwiGLU 2816. S: d 64, 8 blocks, 4 heads,
SwiGLU 176, whose step is hardly more than what does not shrink with the weights. Vocabulary 4,096, prompt 128 and 128
new tokens, random weights and random tokens; every other block routed at 12.5 %, with thresholds calibrated on such
tokens, so that the share that enters is the capacity. Dense sides share one set of weights. All sides take turns in
this process (llama.cpp in one of its own), with new prompts every turn; each figure is a median over the turns. Prints
one JSON line.

`tokens_per_s` counts decoding on every side, without prefill and compilation. `hf` and `hf_static` are `generate()`
with its dynamic and its static cache; on the CPU it compiles neither. `graph` is the Mixture-of-Depths side by the step
that PyTorch compiles, where ours is C++. `llamacpp` is a server with as many slots as
prompts. `mod_over_*` are ratios of those speeds, `roof_fraction` is the bytes a step must read over its time and over
the bandwidth measured in the same turns, `products_fraction` what the dense side's products take alone, at the speed by
which they are chosen, over its step, `prefill_ratio` the time of a causal pass over 1,024 tokens, dense over
Mixture-of-Depths, and `entered` the share of random tokens that enters a routed block.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import gguf
import torch
import xllamacpp
from sampling_sides import SHAPES, build, calibrate, decode_speed, generate_speed, llama, random_tokens, routed

from mixture_of_depths import MoDForCausalLM, SamplingOptions, decode_bytes
from mixture_of_depths.provenance import provenance
from mixture_of_depths.sampling.bench import (
    BYTES,
    cache_of,
    decode_seconds,
    in_precision,
    prefill_seconds,
    read_gigabytes_per_second,
)
from mixture_of_depths.sampling.native import measured, shape_of
from mixture_of_depths.sampling.step import weights_of

PROMPT, NEW, VOCABULARY, LONG = 128, 128, 4096, 1024
OTHERS = ["hf", "llamacpp", "graph"]


def options(seed: int) -> SamplingOptions:
    """At this temperature every token is as likely as any other: which ones enter then rests on the routers alone."""
    return SamplingOptions(max_new_tokens=NEW, temperature=1e6, top_k=0, seed=seed)


def write_gguf(dense: MoDForCausalLM, path: Path) -> None:
    """The dense side's weights for llama.cpp, with a vocabulary of placeholders."""
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size or 0)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_rope_dimension_count(config.head_dim or 0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    extra = VOCABULARY - len(names)
    writer.add_token_list([*names, *(f"t{number}" for number in range(extra))])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * extra])
    writer.add_token_scores([0.0] * VOCABULARY)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    bf16 = dense.dtype == torch.bfloat16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if bf16 else gguf.LlamaFileType.ALL_F32)
    for name, weight in dense.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours, not halves.
            heads = weight.view(config.num_attention_heads, 2, -1, config.hidden_size)
            weight = heads.transpose(1, 2).reshape(weight.shape)
        target = mapping.get_name(name, try_suffixes=(".weight",))
        assert target is not None, name
        values = weight.float().numpy()
        if bf16 and weight.dim() == 2:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: str, batch_size: int, threads: int, pipe: Connection) -> None:
    """A llama.cpp server; takes prompts and a number of tokens from the pipe, and answers when all have them."""
    parameters = xllamacpp.CommonParams()  # pyright: ignore[reportAttributeAccessIssue]
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel, parameters.verbosity = 320 * batch_size, batch_size, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_prompt = False
    server = xllamacpp.Server(parameters)  # pyright: ignore[reportAttributeAccessIssue]

    def run(prompt: list[int], count: int) -> int:
        request = {"prompt": prompt, "n_predict": count, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        return server.handle_completions(request)["timings"]["predicted_n"]

    with ThreadPoolExecutor(batch_size) as pool:
        while True:
            prompts, count = pipe.recv()
            made = list(pool.map(run, prompts, [count] * len(prompts)))
            pipe.send(made == [count] * len(prompts))


class LlamaCpp:
    """llama.cpp in a process of its own, which stands still between its turns: its threads wait by spinning."""

    def __init__(self, dense: MoDForCausalLM, batch_size: int, threads: int, folder: Path) -> None:
        path = folder / f"{dense.dtype}-{batch_size}.gguf"
        write_gguf(dense, path)
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(str(path), batch_size, threads, other), daemon=True)
        self.process.start()

    def speed(self, input_ids: torch.Tensor) -> float:
        assert self.process.pid is not None

        def run(count: int) -> None:
            self.pipe.send((input_ids.tolist(), count))
            assert self.pipe.recv(), "llama.cpp made another number of tokens"

        os.kill(self.process.pid, signal.SIGCONT)
        tokens_per_second = decode_speed(run, input_ids.shape[0], NEW)
        os.kill(self.process.pid, signal.SIGSTOP)
        return tokens_per_second

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def graph_seconds(model: MoDForCausalLM, prompts: torch.Tensor, sampling: SamplingOptions) -> float:
    """As `decode_seconds`, by the step that PyTorch compiles."""
    with patch("mixture_of_depths.sampling.stream.is_own", lambda *_: False):
        return decode_seconds(model, prompts, sampling)


def measure(
    ours: dict[str, MoDForCausalLM],
    precision: str,
    batch_size: int,
    repeats: int,
    threads: int,
    others: list[str],
    folder: Path,
) -> dict[str, Any]:
    texts = [random_tokens(VOCABULARY, batch_size, PROMPT + NEW, seed) for seed in range(repeats + 1)]
    entered = [
        layer.entered[:, PROMPT:].float().mean().item()
        for layer in routed(ours["mod"], random_tokens(VOCABULARY, 32, PROMPT + NEW, seed=0)).values()
    ]
    models = {side: in_precision(model, precision) for side, model in ours.items()}
    sides: dict[str, Callable[[torch.Tensor, int], float]] = {
        side: lambda prompts, turn, model=model: batch_size / decode_seconds(model, prompts, options(turn))
        for side, model in models.items()
    }
    server = None
    # The others have no weights like ours of 8 bits.
    others = [] if precision == "int8" else others
    if "hf" in others:
        peer = llama(models["dense"])
        sides["hf"] = lambda prompts, _: generate_speed(peer, prompts, NEW)
        sides["hf_static"] = lambda prompts, _: generate_speed(peer, prompts, NEW, cache_implementation="static")
    if "graph" in others:
        sides["graph"] = lambda prompts, turn: batch_size / graph_seconds(models["mod"], prompts, options(turn))
    if "llamacpp" in others:
        server = LlamaCpp(models["dense"], batch_size, threads, folder)
        sides["llamacpp"] = lambda prompts, _: server.speed(prompts)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    prefills: dict[str, list[float]] = {side: [] for side in models}
    bandwidths = []
    long = random_tokens(VOCABULARY, 1, LONG, seed=1)
    try:
        for turn in range(repeats + 1):
            order = list(sides)
            for side in order[turn % len(order) :] + order[: turn % len(order)]:
                speed = sides[side](texts[turn][:, :PROMPT].contiguous(), 1000 * turn)
                if turn > 0:
                    speeds[side].append(speed)
            for side, model in models.items():
                prefill = prefill_seconds(model, long)
                if turn > 0:
                    prefills[side].append(prefill)
            bandwidths.append(read_gigabytes_per_second(torch.device("cpu")))
    finally:
        if server is not None:
            server.close()
    middle = {side: median(values) for side, values in speeds.items()}
    bandwidth = median(bandwidths)
    roofs = {}
    for side, model in models.items():
        read = decode_bytes(model.config, PROMPT + NEW // 2, batch_size, 1)
        needed = read.weights * BYTES[precision] + read.cache * max(BYTES[precision], 2)
        roofs[side] = round(needed * middle[side] / batch_size / 1e9 / bandwidth, 3)
    weights = weights_of(models["dense"])
    measured_speeds = measured({shape_of(batch_size, weight) for weight in weights})
    own_seconds = sum(w.nbytes / 1e9 / max(measured_speeds[shape_of(batch_size, w)].values()) for w in weights)
    kept = {side: sum(cache_of(model, tokens) for tokens in texts[1:]) for side, model in models.items()}
    return {
        "tokens_per_s": {side: round(value, 1) for side, value in middle.items()},
        **{f"mod_over_{side}": round(middle["mod"] / value, 3) for side, value in middle.items() if side != "mod"},
        "roof_fraction": roofs,
        "products_fraction": round(own_seconds * middle["dense"] / batch_size, 3),
        "read_gb_per_s": round(bandwidth, 1),
        "cache_bytes_ratio": round(kept["mod"] / kept["dense"], 4),
        "prefill_ratio": round(median(prefills["dense"]) / median(prefills["mod"]), 3),
        "entered": round(sum(entered) / len(entered), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=["A", "B"])
    parser.add_argument("--precisions", choices=list(BYTES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--others",
        choices=OTHERS,
        nargs="*",
        default=["hf", "llamacpp"],
        help="beside our two sides; hf is slow in bf16 without units",
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.compiler.config.recompile_limit = 64
    record: dict[str, Any] = {"benchmark": "decode", "repeats": arguments.repeats}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            ours = build(name, VOCABULARY, 2 * LONG)
            calibrate(ours["mod"], PROMPT, NEW)
            for batch_size in arguments.batch_sizes:
                for precision in arguments.precisions:
                    figures = measure(
                        ours,
                        precision,
                        batch_size,
                        arguments.repeats,
                        arguments.threads,
                        arguments.others,
                        Path(folder),
                    )
                    record[f"{name} {precision} batch {batch_size}"] = figures
                    print(f"{name} {precision} batch {batch_size}: {json.dumps(figures)}", file=sys.stderr, flush=True)
                    torch.compiler.reset()
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
