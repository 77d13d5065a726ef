"""What tests share: small models and their layouts, tokenizers, texts, sequences and checkpoints."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import gguf
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.documents import Skipped, read_documents
from mixture_of_depths.text.tokenizer import train_tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "predictor_hidden_size": 8,
    "initializer_range": 0.5,
}
# The shape of dense models of other families.
LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}

# What of two routed blocks tokens skip.
PARTS: list[Any] = ["block", "block_keep_keys", "mlp", ["block_keep_keys", "mlp"], ["mlp", "block"]]

SENTENCE = "The router lets few tokens in, and the others pass. "
TEXT = "the quick brown fox jumps over the lazy dog\n    <script>é😀</script> שלום" * 3
TOKENIZER = train_tokenizer([TEXT * 10], 300)
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
# A task of lm-evaluation-harness over a file of questions.
TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def tiny(**changes: Any) -> MoDForCausalLM:
    """A small float64 model with large weights, so that routers decide and errors show."""
    return MoDForCausalLM(MoDConfig(**{**TINY, **changes})).double()


def routed_model(**changes: Any) -> MoDForCausalLM:
    """A small model with two routed blocks of different capacities."""
    return MoDForCausalLM(MoDConfig(**{**TINY, "routed_layers": [0, 2], "capacity": [0.25, 0.125], **changes}))


def with_parts(parts: Any, bypass_rank: int, **changes: Any) -> MoDForCausalLM:
    """A small model whose bypasses do something."""
    model = tiny(**{"routed_layers": [0, 2], **changes}, routed_parts=parts, bypass_rank=bypass_rank)
    for layer in model.model.layers:
        if layer.bypass is not None:
            torch.nn.init.normal_(layer.bypass.up.weight, std=0.5)
    return model


def model_with(**changes: Any) -> MoDForCausalLM:
    """A small model that takes the tokens of `TOKENIZER`."""
    fields: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "capacity": 0.25,
        "initializer_range": 0.3,
    }
    return MoDForCausalLM(MoDConfig(**{**fields, **changes})).eval()


def make_checkpoint(folder: Path, max_position_embeddings: int = 128) -> None:
    """A small model with a tokenizer and a chat template."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = MoDConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.3,
    )
    MoDForCausalLM(config).save_pretrained(folder)


def write_gguf(path: Path, model: PreTrainedModel, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A Llama, Qwen2 or Qwen3 model as llama.cpp's converter writes it, with tokens of 300 for its vocabulary.

    Args:
        path: the file.
        model: the model.
        facts: metadata of the architecture to add, or to leave out where the value is None.
        tensors: tensors to add by their names in the file.
    """
    fields: Any = model.config
    tokenizer = train_tokenizer(["Once upon a time"], 300)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary += [f"<unused {i}>" for i in range(fields.vocab_size - len(vocabulary))]
    special: Any = tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
    architecture = fields.model_type
    heads = {"attn_q": fields.num_attention_heads, "attn_k": fields.num_key_value_heads}
    head_dim = getattr(fields, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    stated = {
        "context_length": fields.max_position_embeddings,
        "embedding_length": fields.hidden_size,
        "block_count": fields.num_hidden_layers,
        "feed_forward_length": fields.intermediate_size,
        "attention.head_count": fields.num_attention_heads,
        "attention.head_count_kv": fields.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": fields.rms_norm_eps,
        "rope.freq_base": fields.rope_parameters["rope_theta"],
        "vocab_size": fields.vocab_size,
    }
    stated |= {"rope.dimension_count": head_dim} if architecture == "llama" else {}
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in {**stated, **facts}.items():
        if value is not None:
            add[type(value)](f"{architecture}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if i in special else 1 for i in range(len(vocabulary))])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_eos_token_id(special[0])
    writer.add_bos_token_id(special[0])
    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, fields.num_hidden_layers)
    writer.add_chat_template(TEMPLATE)
    for full_name, weight in model.state_dict().items():
        name, _, suffix = full_name.rpartition(".")
        short = names.get_name(name)
        assert short is not None
        part = short.rpartition(".")[2]
        if architecture == "llama" and part in heads:
            # It rotates neighbours where transformers rotates halves.
            weight = weight.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        if full_name != "lm_head.weight" or not fields.tie_word_embeddings:
            writer.add_tensor(f"{short}.{suffix}", weight.float().contiguous().numpy())
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def distinct_tokens(batch: int, length: int) -> torch.Tensor:
    """Rows without repeats: equal tokens that follow one another differ by rounding alone, which then decides ties."""
    return torch.stack([torch.randperm(31)[:length] for _ in range(batch)])


def left_padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, all but the first padded on the left, and their mask."""
    input_ids = torch.randint(0, 31, (batch, length))
    mask = torch.ones_like(input_ids)
    for row in range(1, batch):
        mask[row, : min(row * 2, length - 1)] = 0
    return input_ids, mask


def layout(kind: str, batch: int, length: int, generator: torch.Generator) -> tuple[Any, Any, Any, Any, Any]:
    """Inputs of the model and the lists of the oracle: real tokens, positions, documents."""
    real = [[True] * length for _ in range(batch)]
    positions = [list(range(length)) for _ in range(batch)]
    documents = [[0] * length for _ in range(batch)]
    mask = position_ids = None
    if kind in ("left", "right") and length > 1:
        for b in range(batch):
            pad = int(torch.randint(0, length, (), generator=generator))
            real[b] = [i >= pad if kind == "left" else i < length - pad for i in range(length)]
            positions[b] = [max(0, sum(real[b][: i + 1]) - 1) for i in range(length)]
        mask = torch.tensor(real).long()
    elif kind == "packed" and length > 1:
        for b in range(batch):
            start = int(torch.randint(1, length, (), generator=generator))
            positions[b] = list(range(start)) + list(range(length - start))
            documents[b] = [0] * start + [1] * (length - start)
        position_ids = torch.tensor(positions)
    return mask, position_ids, real, positions, documents


def varlen_under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What `varlen_attn` computes where queries and keys are the same tokens, on any device, in any type."""
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    assert query.shape == key.shape
    tokens = torch.arange(query.shape[0], device=query.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seq_q, tokens, right=True)
    mask = (document[:, None] == document) & (tokens[:, None] >= tokens)
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))
    weights = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(0, 1)


def some_sequences(count: int = 12, length: int = 64) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": torch.randint(1, 31, (count, length)).tolist()})


def traced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as a compiled step has it, in float32 with what is rounded, without compiling it."""
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True, dynamic=False)


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has graphs traced and run as they are, which spares the minute that compiling them takes."""
    compile_graph = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **fields: compile_graph(function, backend="eager", fullgraph=True, dynamic=False),
    )


def check_gradients(model: MoDForCausalLM, loss: torch.Tensor, reference_loss: torch.Tensor) -> None:
    """Both losses have the same gradients by every weight."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(reference_loss, parameters, allow_unused=True)
    for name, a, b in zip(names, got, wanted, strict=True):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros(()) if b is None else b
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() / scale < 1e-9, name


def greedy(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens that transformers' `generate()` adds."""
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids, attention_mask=mask, **settings)[:, input_ids.shape[1] :]


@cache
def _sentence_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([SENTENCE * 50], 300)


def sentence_tokenizer() -> Any:
    """A tokenizer that a test may change."""
    return copy.deepcopy(_sentence_tokenizer())


def write_numbers(folder: Path, numbers: range = range(40)) -> None:
    """A file for each number, with its multiples."""
    for i in numbers:
        (folder / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1, 60)) + SENTENCE)


def write_files(folder: Path, count: int = 40) -> None:
    """Files of one length, each with a number of its own."""
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"{i} {SENTENCE * 20}")


def options(tmp_path: Path, *data: str, **changes: Any) -> DataOptions:
    """Of small sequences, with the cache in the folder."""
    small: dict[str, Any] = {"sequence_length": 16, "validation_fraction": 0.2}
    if "tokenizer" not in changes:
        small["vocab_size"] = 300
    return DataOptions(data=data, cache_dir=tmp_path / "cache", **{**small, **changes})


def read(opts: DataOptions) -> tuple[list[str], Skipped]:
    """All documents, and what was skipped."""
    skipped = Skipped()
    return list(read_documents(opts, skipped)), skipped


def write_chats(folder: Path, count: int) -> None:
    """Conversations of two turns, each with numbers of its own."""
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(count):
            asked, said = {"role": "user", "content": f"Count by {i}."}, " ".join(str(i * j) for j in range(1, 20))
            messages = [
                asked,
                {"role": "assistant", "content": said},
                asked,
                {"role": "assistant", "content": SENTENCE},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
