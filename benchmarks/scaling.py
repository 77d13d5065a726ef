"""What of Mixture-of-Depths' saving survives on 8 to 512 GPUs, worked out and not measured; prints Markdown tables.

    python benchmarks/scaling.py

Operations are those of `mixture_of_depths.model.flops`. A GPU reaches `EFFICIENCY` of its peak in products, whatever
their size, and collectives `BANDWIDTH_SHARE` of the links; latency is left out. Every step trains on the same global
batch.

FSDP (`fully_shard` per block): a block's weights are gathered in the forward and in the backward pass of every part of
the batch, one block ahead of the compute; gradients are scattered once, in the last part's backward pass. The larger of
a block's compute and the transfer that runs beside it counts.

Tensor parallelism in a node, FSDP across nodes: products are split eight ways. In each of the two passes a block sums
two activations over the node, while the compute waits; FSDP moves an eighth of a block's weights as above.
"""

from dataclasses import dataclass
from typing import Any

from mixture_of_depths import MoDConfig, model_parameters, training_flops_per_token
from mixture_of_depths.model.flops import block_flops, block_parameters, router_flops, router_parameters

# H100 SXM: NVIDIA's data sheet gives 1,979 TFLOPS in bf16 with sparsity, half of that without, and 900 GB/s of NVLink
# both ways; a DGX H100 has 8 of them and 8 network ports of 400 Gb/s.
PEAK_FLOPS = 989e12
NVLINK = 450e9
FAST_NETWORK = 8 * 400e9 / 8
# One port of 400 Gb/s a node, as cheaper clusters have.
SLOW_NETWORK = 400e9 / 8
GPUS_PER_NODE = 8
EFFICIENCY = 0.5
BANDWIDTH_SHARE = 0.8
# bf16 weights, gradients and activations are moved; weights, gradients and Adam's two averages are kept in float32.
MOVED, KEPT = 2, 16

SEQUENCE_LENGTH, GLOBAL_BATCH = 4096, 512
# Sequences of a GPU that are computed at once.
PART = 2
SIZES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 18, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
GPUS = (8, 16, 32, 64, 128, 256, 512)


def config_of(size: str, routed: bool) -> MoDConfig:
    shape = {"vocab_size": 32000, "max_position_embeddings": SEQUENCE_LENGTH, **SIZES[size]}
    return MoDConfig(**shape, capacity=0.125) if routed else MoDConfig(**shape, routed_layers=[])


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers at once, a block or the head, and its work on one sequence.

    Attributes:
        weights: number of them.
        shared_flops: forward operations that tensor parallelism splits.
        own_flops: forward operations that every GPU of a node does: the router's.
        tokens: how many enter it, whose activations tensor parallelism sums.
    """

    weights: float
    shared_flops: float
    own_flops: float
    tokens: int


def units(config: MoDConfig) -> list[Unit]:
    """Blocks and head in the order of the forward pass; the embedding, which computes nothing, lies with the head."""
    blocks = []
    for layer_idx in range(config.num_hidden_layers):
        is_routed = layer_idx in (config.routed_layers or [])
        tokens = config.capacity_tokens(layer_idx, SEQUENCE_LENGTH) if is_routed else SEQUENCE_LENGTH
        flops = block_flops(config, tokens, tokens * (tokens + 1) / 2, 0).total
        router = router_flops(config, SEQUENCE_LENGTH).total if is_routed else 0.0
        weights = block_parameters(config) + (router_parameters(config) if is_routed else 0)
        blocks.append(Unit(weights, flops, router, tokens))
    ends = config.vocab_size * config.hidden_size
    return [*blocks, Unit(2 * ends + config.hidden_size, 2.0 * ends * SEQUENCE_LENGTH, 0.0, 0)]


def step_seconds(config: MoDConfig, gpus: int, network: float, tensor_parallel: int = 1) -> float:
    """Time of a training step: all parts of a GPU's share of the batch."""
    ranks = gpus // tensor_parallel
    share = GLOBAL_BATCH / ranks
    # Tensor parallelism spreads a part's activations, too.
    part = min(share, PART * tensor_parallel)
    within_node = tensor_parallel == 1 and gpus <= GPUS_PER_NODE
    # Each of a node's tensor parallel ranks gathers over the network with its own share of it.
    link = NVLINK if within_node else min(NVLINK, network / tensor_parallel)

    def moved(weights: float) -> float:
        return weights / tensor_parallel * MOVED * (ranks - 1) / ranks / (link * BANDWIDTH_SHARE)

    parts = units(config)
    gather = [moved(unit.weights) for unit in parts]
    compute = [
        part * (unit.shared_flops / tensor_parallel + unit.own_flops) / (PEAK_FLOPS * EFFICIENCY) for unit in parts
    ]
    ring = 2 * (tensor_parallel - 1) / tensor_parallel
    waits = [2 * part * unit.tokens * config.hidden_size * MOVED * ring / (NVLINK * BANDWIDTH_SHARE) for unit in parts]
    forward = sum(max(compute[i] + waits[i], gather[i + 1] if i + 1 < len(parts) else 0.0) for i in range(len(parts)))
    backward = [(2 * compute[i] + waits[i], gather[i - 1] if i > 0 else 0.0, gather[i]) for i in range(len(parts))]
    usual = forward + sum(max(busy, ahead) for busy, ahead, _ in backward)
    last = forward + sum(max(busy, ahead + scatter) for busy, ahead, scatter in backward)
    return (share / part - 1) * usual + last


def activation_bytes(config: MoDConfig) -> float:
    """Bytes that the backward pass of a part needs, attention's scores recomputed and nothing else."""
    assert config.intermediate_size is not None
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    width, key_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    # Two norms with their inputs, queries, keys, values, attention's result; gate, up, their activation and product.
    per_token = 4 * width + 2 * config.num_attention_heads * config.head_dim + 2 * key_size
    per_token += 4 * config.intermediate_size
    in_blocks = 0.0
    for layer_idx, unit in enumerate(units(config)[:-1]):
        in_blocks += unit.tokens * per_token * MOVED
        if layer_idx in (config.routed_layers or []):
            # The residual stream that the router reads, the delta that the gate scales.
            in_blocks += (SEQUENCE_LENGTH + unit.tokens) * width * MOVED
    # Logits and their softmax in float32.
    return PART * (in_blocks + SEQUENCE_LENGTH * config.vocab_size * 2 * 4)


def memory_gb(config: MoDConfig, gpus: int) -> tuple[float, float, float, float]:
    """Gigabytes a GPU keeps under FSDP.

    The state of training; the gradients of several parts, summed up before they are scattered; two gathered blocks; and
    the activations of a part.
    """
    has_parts = GLOBAL_BATCH / gpus > PART
    largest = max(unit.weights for unit in units(config))
    return (
        KEPT * model_parameters(config) / gpus / 1e9,
        MOVED * model_parameters(config) / 1e9 if has_parts else 0.0,
        2 * largest * MOVED / 1e9,
        activation_bytes(config) / 1e9,
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models() -> str:
    rows = []
    for size in SIZES:
        dense, mod = config_of(size, False), config_of(size, True)
        flops = [training_flops_per_token(config, SEQUENCE_LENGTH) / 1e9 for config in (dense, mod)]
        weights = [model_parameters(config) / 1e9 for config in (dense, mod)]
        rows.append([size, *(f"{w:.3f}" for w in weights), *(f"{f:.2f}" for f in flops), f"{flops[0] / flops[1]:.2f}"])
    return table(
        ["", "weights, dense (1e9)", "MoD (1e9)", "training GFLOPs a token, dense", "MoD", "their ratio"], rows
    )


def memory() -> str:
    rows = []
    for size in SIZES:
        for gpus in (8, 64, 512):
            for name, routed in (("dense", False), ("MoD", True)):
                gigabytes = memory_gb(config_of(size, routed), gpus)
                rows.append([f"{size} {name}", str(gpus), *(f"{gb:.1f}" for gb in gigabytes), f"{sum(gigabytes):.1f}"])
    header = ["GB", "GPUs", "weights, gradients, Adam", "gradients of parts", "two blocks", "activations", "together"]
    return table(header, rows)


def communication() -> str:
    rows = []
    for size in SIZES:
        sizes = []
        for routed in (False, True):
            config = config_of(size, routed)
            gathered = 2 * MOVED * sum(unit.weights for unit in units(config)) / 1e9
            # Two sums a pass and block, forward and backward, of activations that enter it.
            summed = PART * 4 * MOVED * sum(unit.tokens for unit in units(config)) * config.hidden_size / 1e9
            sizes.append((gathered, summed))
        (dense_fsdp, dense_tp), (mod_fsdp, mod_tp) = sizes
        rows.append([f"{size}, FSDP: weights gathered", *(f"{gb:.2f}" for gb in (dense_fsdp, mod_fsdp))])
        rows[-1].append(f"{mod_fsdp / dense_fsdp:.2f}")
        rows.append([f"{size}, tensor parallelism: activations summed", *(f"{gb:.2f}" for gb in (dense_tp, mod_tp))])
        rows[-1].append(f"{mod_tp / dense_tp:.2f}")
    return table([f"GB for {PART} sequences", "dense", "MoD", "ratio"], rows)


def speed_up() -> str:
    columns = [
        ("FSDP, 8 ports a node", FAST_NETWORK, 1),
        ("FSDP, 1 port a node", SLOW_NETWORK, 1),
        ("TP 8 and FSDP, 8 ports", FAST_NETWORK, GPUS_PER_NODE),
        ("TP 8 and FSDP, 1 port", SLOW_NETWORK, GPUS_PER_NODE),
    ]
    rows = []
    for size in SIZES:
        dense, mod = config_of(size, False), config_of(size, True)
        for gpus in GPUS:
            row = [size, str(gpus)]
            for _, network, tensor_parallel in columns:
                before, after = (step_seconds(config, gpus, network, tensor_parallel) for config in (dense, mod))
                row.append(f"{before * 1e3:,.0f} / {after * 1e3:,.0f} = {before / after:.2f}")
            rows.append(row)
    return table(["", "GPUs", *(name for name, _, _ in columns)], rows)


def main() -> None:
    print("\n\n".join([models(), memory(), communication(), speed_up()]))


if __name__ == "__main__":
    main()
