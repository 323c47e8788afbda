"""Causal language models as programs that read tokens at positions, and take and give the keys and values of others.

A cache has a fixed length (the context), a slot for each position: the one form that ONNX, Core ML and LiteRT all take.
The model's own modules compute (transformers); what is replaced while they are traced is how keys are kept, how queries
meet them, and how positions turn them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgekd.errors import ModelFileError, UsageError, first_line
from edgekd.programs.tracing import rename_outputs, retrace, without_origin
from edgekd.quiet import quiet
from edgekd.types import LOGITS, TensorSpec

__all__ = ["POSITIONS", "TOKENS", "cache_names", "caches_of", "decoder_program", "last_token"]

TOKENS, POSITIONS = "tokens", "input_pos"
"""Names of what a decoder reads and gives; those of its caches are ``kv_cache_k_0``, ``kv_cache_v_0`` … as LiteRT-LM
has them, and what it gives for the next call is called ``kv_cache_k_0_out`` …"""

_HIDDEN = -3e4
"""Added to the product with a key that comes after a query: finite in half precision, and e to that is 0."""

_TOLERANCE = 1e-3
_ATTENTION = "edgekd_cached"


def cache_names(layers: int) -> list[str]:
    """Names of the caches in the order of the program's inputs."""
    return [f"kv_cache_{kind}_{layer}" for layer in range(layers) for kind in "kv"]


def caches_of(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Those of the inputs (or of the outputs) that are caches."""
    return tuple(spec for spec in specs if spec.name.startswith("kv_cache_"))


def last_token(program: ExportedProgram) -> ExportedProgram:
    """The same program with logits of the last token alone, (1, 1, vocabulary): what an answer goes on from."""
    module = program.module(check_guards=False)
    output = next(node for node in module.graph.nodes if node.op == "output")
    logits = output.args[0][0]
    if logits.target is torch.ops.aten.linear.default:  # of the others nothing is computed
        with module.graph.inserting_before(logits):
            last = module.graph.call_function(torch.ops.aten.slice.Tensor, (logits.args[0], 1, -1))
        logits.replace_input_with(logits.args[0], last)
    else:
        with module.graph.inserting_before(output):
            last = module.graph.call_function(torch.ops.aten.slice.Tensor, (logits, 1, -1))
        output.replace_input_with(logits, last)
    module.recompile()
    return retrace(module, program)


def decoder_program(model: nn.Module, context: int) -> ExportedProgram:
    """A causal language model of transformers as a program with caches, held against the model before it is returned.

    Inputs: ``tokens`` int32 (1, n); ``input_pos`` int32 (1, n), their positions, one after the other; for each layer
    ``kv_cache_k_<i>`` and ``kv_cache_v_<i>`` (1, key heads, context, size), zeros at the start. Outputs: ``logits``
    (1, n, vocabulary) of the token after each, and the caches with the new keys and values in the slots of their
    positions. A query sees the slots up to its own position, so what a slot holds before it is written does not matter.

    Args:
        model: ``LlamaForCausalLM`` or another decoder of transformers, in evaluation mode.
        context: Slots of the caches: how many tokens prompt and answer may have together.

    Raises:
        UsageError: The context is beyond what the model was made for.
        ModelFileError: ``torch.export`` cannot trace the model, or the program computes something else than the model.
    """
    config = model.config
    _check_context(config, context)
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    caches = {name: torch.zeros(1, heads, context, size) for name in cache_names(layers)}
    tokens = torch.zeros(1, 8, dtype=torch.int32)
    positions = torch.arange(8, dtype=torch.int32)[None]
    shapes = torch.export.ShapesCollection()
    length = Dim("length", min=2, max=context)  # torch.export takes 1 for a size of its own; the program does not
    shapes[tokens] = shapes[positions] = {1: length}
    try:
        with torch.no_grad(), quiet(), _prepared(model, context):
            decoder = _Decoder(model, context, layers, config.num_attention_heads // heads).eval()
            program = torch.export.export(
                decoder,
                (tokens, positions, *caches.values()),
                dynamic_shapes=shapes,
                strict=False,
            )
    except Exception as error:
        raise ModelFileError(
            f"torch.export cannot trace {type(model).__name__} with a cache: {first_line(error)}"
        ) from error
    rename_outputs(without_origin(program), [LOGITS, *(f"{name}_out" for name in caches)])
    _hold_against(program, model, caches)
    return program


class _Decoder(nn.Module):
    """What is traced."""

    def __init__(self, model: nn.Module, context: int, layers: int, shared: int) -> None:
        super().__init__()
        self.model = model
        self.shared = shared
        self.register_buffer("slots", torch.arange(context, dtype=torch.int32), persistent=False)

        names = [TOKENS, POSITIONS, *cache_names(layers)]

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self.step(inputs[0], inputs[1], dict(zip(names[2:], inputs[2:], strict=True)))

        # torch.export calls inputs after the parameters of forward, and their number is the model's.
        kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(kinds)  # type: ignore[attr-defined]
        self.forward = forward

    def step(self, tokens: Tensor, positions: Tensor, caches: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        hidden = (self.slots > positions[..., None])[:, None]  # (1, 1, n, context)
        mask = hidden.float() * _HIDDEN
        # Queries that share a key stand below one another: (1, 1, queries of a key · n, context).
        mask = torch.cat([mask] * self.shared, dim=2)
        slots = _slots(caches, positions[0].long())
        output = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=slots,
            cache_position=positions[0],
            use_cache=True,
        )
        return output.logits, *slots.caches.values()


def _slots(caches: Mapping[str, Tensor], positions: Tensor) -> Any:
    """The caches as transformers' layers write and read them."""
    from transformers.cache_utils import Cache

    class Slots(Cache):
        def __init__(self) -> None:  # not the parent's, which would make layers of its own
            self.caches = dict(caches)
            self.layers: list[Any] = []

        def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            key, value = f"kv_cache_k_{layer}", f"kv_cache_v_{layer}"
            self.caches[key] = self.caches[key].index_copy(2, positions, keys)
            self.caches[value] = self.caches[value].index_copy(2, positions, values)
            return self.caches[key], self.caches[value]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def get_mask_sizes(self, cache_position: Tensor, layer_idx: int) -> tuple[int, int]:
            return next(iter(self.caches.values())).shape[2], 0

    return Slots()


class _Turns(nn.Module):
    """The model's rotary embedding as tables: sines of large positions computed in half precision would be noise."""

    def __init__(self, rotary: nn.Module, context: int) -> None:
        super().__init__()
        cos, sin = rotary(torch.zeros(1), torch.arange(context)[None])
        self.register_buffer("rotary_cos", cos.contiguous())  # (1, context, size)
        self.register_buffer("rotary_sin", sin.contiguous())

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary_cos.index_select(1, position_ids[0]), self.rotary_sin.index_select(1, position_ids[0])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention whose keys are read once for all queries that share them, where transformers would repeat the cache.

    Args:
        query: (1, heads, n, size).
        key, value: (1, key heads, context, size).
        attention_mask: Added to the products, (1, 1, heads / key heads · n, context).
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("attention with a soft cap or with sinks is not supported")
    batch, heads, length, size = query.shape
    shared = heads // key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    rows = (query * scaling).reshape(batch, key.shape[1], shared * length, size)
    weights = torch.softmax(rows @ key.transpose(2, 3) + attention_mask, dim=-1)
    found = (weights @ value).unflatten(2, (shared, length))
    return found.permute(0, 3, 1, 2, 4).flatten(2, 3), None


def _root_mean_square(module: Any) -> Any:
    def forward(hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)

    return forward


@contextlib.contextmanager
def _prepared(model: nn.Module, context: int) -> Iterator[None]:
    """The model as it is traced: cached attention, tables of turns, norms whole, so that each target takes its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    before = model.config._attn_implementation
    rotary = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if name.startswith("rotary_emb") and hasattr(child, "inv_freq")
    ]
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon")]
    try:
        model.config._attn_implementation = _ATTENTION
        for owner, name, child in rotary:
            setattr(owner, name, _Turns(child, context))
        for norm in norms:
            norm.forward = _root_mean_square(norm)
        yield
    finally:
        model.config._attn_implementation = before
        for owner, name, child in rotary:
            setattr(owner, name, child)
        for norm in norms:
            del norm.forward


def _check_context(config: Any, context: int) -> None:
    longest = getattr(config, "max_position_embeddings", None) or context
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        longest = min(longest, window)
    if not 2 <= context <= longest:
        raise UsageError(f"a context of {context} tokens was asked for; this model takes 2 to {longest}")


def _hold_against(program: ExportedProgram, model: nn.Module, caches: Mapping[str, Tensor]) -> None:
    """Read some tokens at once, then one by one, and compare with what the model makes of them without a cache.

    Raises:
        ModelFileError: They differ: the architecture is one that the caches do not serve.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(12, next(iter(caches.values())).shape[2])
    tokens = torch.randint(0, model.config.vocab_size, (1, count), generator=generator)
    module = program.module(check_guards=False)  # the guards would refuse a single token
    with torch.no_grad():
        wanted = model(input_ids=tokens, use_cache=False).logits
        kept, found = dict(caches), []
        for start, end in [(0, count // 2), *((i, i + 1) for i in range(count // 2, count))]:
            positions = torch.arange(start, end, dtype=torch.int32)[None]
            logits, *written = module(tokens[:, start:end].int(), positions, *kept.values())
            found.append(logits)
            kept = dict(zip(caches, written, strict=True))
    error = float((torch.cat(found, 1) - wanted).abs().max())
    bound = _TOLERANCE * max(1.0, float(wanted.abs().max()))
    if not error <= bound:
        raise ModelFileError(
            f"{type(model).__name__} computes something else with a cache of slots: logits differ by {error:.3g}, "
            f"{bound:.3g} is allowed; Llama, Mistral, Qwen2 and Qwen3 work"
        )
