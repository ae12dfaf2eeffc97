"""Attention without padding, for the stock models of transformers: the rows of a batch end to end.

A ranker plans the packing of a padded batch and passes it to its stock model as the keyword `packed`. Hooks pack what
the model reads and unpack what its last layer returns; without the keyword they do nothing. No call changes a model,
so threads can share one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

PACKED = "disranker_packed"
# Families whose layers pass unknown keywords on to plain attention, with a window at most. Not those with relative
# positions, soft-capping, sinks, recurrent or shared layers. BERT's relatives (True) project keys and values from a
# layer's own input, so that the last layer can compute only the token that the head reads.
FAMILIES = dict.fromkeys(("bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta"), True)
FAMILIES |= dict.fromkeys(("distilbert", "eurobert", "gte", "modernbert", "nomic_bert"), False)
FAMILIES |= dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma"), False)
FAMILIES |= dict.fromkeys(("gemma3_text", "phi3", "smollm3", "olmo2", "olmo3", "glm4", "gpt_neox", "opt"), False)
FAMILIES |= dict.fromkeys(("starcoder2", "deepseek_v3"), False)
# Above this many keys the weights of all heads exceed the caches; below it, plain products are faster on a CPU.
_LONG = 512


def packs(config: PreTrainedConfig) -> bool:
    """Return whether models of this config skip padding, with this module's attention."""
    return config.model_type in FAMILIES and not getattr(config, "use_bidirectional_attention", False)


@dataclass(frozen=True, eq=False)
class Packed:
    """Segments of a padded batch, end to end: whole rows, or the rows' remainders after a prefix that they share.

    Attributes:
        tokens: Index of each token in the flattened batch, shape (tokens,).
        positions: Position of each token in its row, shape (tokens,).
        runs: (segments, queries, keys) of consecutive segments with as many queries and as many keys.
        keys: Index of each key among the tokens; None if a segment's keys are its tokens.
        read: Index of the token that the head reads, shape (rows,); None if it reads all.
        shape: (rows, longest) of the batch.
        exit: Last layer, which returns unpacked states.
        alone: If True, only the tokens in `read` are queries in the last layer.
        context: Input of such a last layer, shape (tokens, size).
    """

    tokens: Tensor
    positions: Tensor
    keys: Tensor | None
    read: Tensor | None
    runs: list[tuple[int, int, int]]
    shape: tuple[int, int]
    exit: nn.Module
    alone: bool
    context: Tensor | None = None

    @functools.cached_property
    def bounds(self) -> Any:
        """Ends of the segments among queries and keys, from 0 on, shape (segments + 1,) each, int32."""
        sizes = np.array([run[1:] for run in self.runs for _ in range(run[0])])
        ends = np.pad(sizes.cumsum(axis=0), ((1, 0), (0, 0))).T.astype(np.int32)
        return [torch.from_numpy(end.copy()).to(self.tokens.device) for end in ends]


def install(model: PreTrainedModel) -> None:
    """Make a model skip padding, if its family supports it and its attention is sdpa."""
    base = model.base_model
    if not packs(model.config) or base.config._attn_implementation not in ("sdpa", PACKED):
        return
    base.set_attn_implementation(PACKED)
    base.register_forward_pre_hook(_enter, with_kwargs=True)
    for layer in _layers(base):
        layer.register_forward_pre_hook(_narrow, with_kwargs=True)
        layer.register_forward_hook(_leave, with_kwargs=True)


def plan(
    model: PreTrainedModel, inputs: dict[str, Any], side: str | None, groups: Sequence[Any] | None = None
) -> Packed | None:
    """Plan the packing of a padded batch.

    Args:
        model: The ranker, after `install`.
        inputs: Keywords of its forward.
        side: Token of a row that its head reads: "first", "last", or None for all.
        groups: A key for each row: neighbours with equal keys share their common first tokens. None shares nothing.

    Returns:
        The plan; None if the batch keeps its padding: with another attention than this module's, in traced graphs, if
        more than logits is requested, or where no kernel fits.
    """
    base, ids, mask = model.base_model, inputs.get("input_ids"), inputs.get("attention_mask")
    if base.config._attn_implementation != PACKED or ids is None or _asks_more(model, inputs) or not _has_fit(model):
        return None
    if mask is not None and mask.shape != ids.shape:
        return None
    real = np.ones(ids.shape, bool) if mask is None else mask.bool().cpu().numpy()
    first, last = real.argmax(axis=1), real.shape[1] - real[:, ::-1].argmax(axis=1)
    # Not for empty rows or holes, nor for left padding unless the head reads the last token: encoders count positions
    # from the left, padding included.
    if not (real.any(axis=1) & (real.sum(axis=1) == last - first)).all() or (side != "last" and first.any()):
        return None
    return _pack(base, ids, (first, last), side, range(len(ids)) if groups is None else groups)


def _pack(base: PreTrainedModel, ids: Tensor, spans: Any, side: str | None, groups: Sequence[Any]) -> Packed:
    """Pack rows, given the columns of their first tokens and those after their last."""
    (first, last), start = spans, np.arange(len(ids)) * ids.shape[1]
    segments = _segments(ids, start + first, start + last, groups)
    tokens = np.concatenate([np.arange(begin, begin + asking) for _, asking, begin, _ in segments])
    place = np.zeros(ids.numel(), int)
    place[tokens] = np.arange(len(tokens))
    keys = None
    if any(seen > asking for seen, asking, _, _ in segments):
        parts = [((prefix, seen - asking), (begin, asking)) for seen, asking, begin, prefix in segments]
        keys = place[np.concatenate([np.arange(at, at + size) for pair in parts for at, size in pair])]
    read = None if side is None else place[start + (first if side == "first" else last - 1)]
    positions = tokens % ids.shape[1] - first[tokens // ids.shape[1]]
    runs = [(len(list(run)), *size[::-1]) for size, run in groupby(segments, key=lambda segment: segment[:2])]
    layer: Any = _layers(base)[-1]
    alone = side is not None and FAMILIES[base.config.model_type] and not layer.gradient_checkpointing
    found: Any = [None if x is None else torch.from_numpy(x).to(ids.device) for x in (tokens, positions, keys, read)]
    return Packed(found[0], found[1], found[2], found[3], runs, (ids.shape[0], ids.shape[1]), layer, alone)


def _segments(
    ids: Tensor, begin: np.ndarray, end: np.ndarray, groups: Sequence[Any]
) -> list[tuple[int, int, int, int]]:
    """Return (keys, queries, first token, first token of the shared prefix) of each segment, longest first."""
    flat, segments = ids.flatten(), []
    for _, run in groupby(range(len(groups)), key=lambda row: groups[row]):
        rows = list(run)
        prefix, shared = int(begin[rows[0]]), 0
        if len(rows) > 1:
            texts = [flat[begin[row] : end[row]].tolist() for row in rows]
            # commonprefix accepts any sequences, not only paths; each row keeps its last token.
            shared = min(len(commonprefix(texts)), min(map(len, texts)) - 1)
        if shared:
            segments.append((shared, shared, prefix, prefix))
        for row in rows:
            size = int(end[row] - begin[row])
            segments.append((size, size - shared, int(begin[row]) + shared, prefix))
    return sorted(segments, key=lambda segment: segment[:2], reverse=True)


def _asks_more(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether keywords ask for more than logits; unknown ones do not, such as CrossEncoder's `scores`."""
    config = model.config
    given = ("inputs_embeds", "past_key_values", "cache", "encoder_hidden_states")
    asked = (inputs.get(name) or getattr(config, name) for name in ("output_attentions", "output_hidden_states"))
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    decodes = getattr(config, "is_decoder", False) or inputs.get("use_cache")
    return traced or decodes or any(asked) or any(inputs.get(name) is not None for name in given)


def _has_fit(model: PreTrainedModel) -> bool:
    """Return whether the device has a fast attention for segments: products on a CPU, torch's kernel on a GPU."""
    if model.device.type == "cpu":
        return True
    names = ("attention_dropout", "attention_probs_dropout_prob")
    drops = model.training and any(getattr(model.config, name, 0.0) for name in names)
    half = torch.is_autocast_enabled("cuda") or model.dtype in (torch.bfloat16, torch.float16)
    return model.device.type == "cuda" and half and not drops and _has_kernel()


@functools.cache
def _has_kernel() -> bool:
    """Return whether torch has `varlen_attn` with windows and grouped heads, from 2.11 on."""
    return (
        varlen_attn is not None and {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
    )


def _layers(base: nn.Module) -> nn.ModuleList:
    return next(part for part in base.modules() if isinstance(part, nn.ModuleList))


@functools.cache
def parameters(forward: Any) -> list[str]:
    """Return the names of the parameters of a class's method `forward`, without self."""
    return list(inspect.signature(forward).parameters)[1:]


def _enter(base: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pack what a stock model reads."""
    if (packed := kwargs.get("packed")) is None:
        return None
    given = {"position_ids": None} | dict(zip(parameters(type(base).forward), args, strict=False)) | kwargs
    embeddings: Any = getattr(base, "embeddings", None)
    if given["position_ids"] is None and hasattr(embeddings, "create_position_ids_from_input_ids"):  # RoBERTa's
        given["position_ids"] = embeddings.create_position_ids_from_input_ids(
            given["input_ids"], embeddings.padding_idx
        )
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape[:2] == packed.shape:
            given[name] = value.flatten(0, 1)[packed.tokens].unsqueeze(0)
    if given["position_ids"] is None:
        given["position_ids"] = packed.positions.unsqueeze(0)
    # A mask with four dimensions is passed on unchanged; any other would be expanded to tokens x tokens.
    given["attention_mask"] = torch.empty(1, 1, 1, 1, device=packed.tokens.device)
    return (), given


def _narrow(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """In BERT's last layer, compute only the token that the head reads."""
    packed = kwargs.get("packed")
    if packed is None or packed.exit is not layer or not packed.alone:
        return None
    read, order = packed.read.sort()
    alone = [(segments, 1, keys) for segments, _, keys in packed.runs]
    packed = replace(packed, read=order.argsort(), runs=alone, context=args[0][0])
    return (args[0][:, read], *args[1:]), kwargs | {"packed": packed}


def _leave(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Unpack what the last layer returns: the token of each row that the head reads, or all with their padding."""
    packed = kwargs.get("packed")
    if packed is None or packed.exit is not layer:
        return None
    hidden = (output[0] if isinstance(output, tuple) else output)[0]
    if packed.read is not None:
        hidden = hidden[packed.read].unsqueeze(1)
    else:
        rows, longest = packed.shape
        empty = hidden.new_zeros(rows * longest, hidden.shape[1])
        hidden = empty.index_copy(0, packed.tokens, hidden).view(rows, longest, -1)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Apply sdpa; with the keyword `packed`, let each segment attend to its keys, within the layer's window.

    Query has shape (1, heads, tokens, size); key and value may have fewer heads. Returns (1, tokens, heads, size).
    """
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if others := [name for name in ("position_bias", "s_aux", "softcap") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} has {others[0]}, which attention without padding does not support.")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if packed.context is not None:
        key, value = (project(packed.context).view(-1, *key.shape[1:]) for project in (module.key, module.value))
    elif packed.keys is not None:
        key, value = key[packed.keys], value[packed.keys]
    causal, window = kwargs.get("is_causal"), kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    causal = getattr(module, "is_causal", True) if causal is None else causal
    reach = -1 if window is None else window - 1
    options = {"scale": kwargs.get("scaling") or query.shape[2] ** -0.5, "window": (reach, 0 if causal else reach)}
    drop = kwargs.get("dropout", 0.0)
    # Under autocast rotary positions leave queries and keys in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if _takes_kernel(query, value, drop):
        mixed = _by_kernel(query, key, value, packed, **options)
    else:
        mixed = _by_products(query, key, value, packed, drop=drop, **options)
    return mixed.unsqueeze(0), None


def _takes_kernel(query: Tensor, value: Tensor, drop: float) -> bool:
    """Return whether torch's kernel for segments computes this attention."""
    size, half = query.shape[2], query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and _has_kernel() and half and size == value.shape[2] <= 256 and not drop


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: tuple[int, int]
) -> Any:
    longest: Any = [max(run[side] for run in packed.runs) for side in (1, 2)]
    options: Any = {"scale": scale, "window_size": window, "enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_attn(query, key, value, *packed.bounds, *longest, **options)


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float, window: tuple[int, int], drop: float
) -> Tensor:
    """Compute the attention of segments, run by run; arguments and result as of `varlen_attn`.

    On a CPU plain products are faster than the fused kernel for texts of some 100 tokens, above all in the backward
    pass.
    """
    asking, seen = ([run[0] * run[side] for run in packed.runs] for side in (1, 2))
    # Few operations per run: for a small model, launching them takes as long as the arithmetic.
    queries, keys, values = (x.transpose(0, 1) for x in (query * scale, key, value))
    if len(queries) != len(keys):
        keys, values = (x.repeat_interleave(len(queries) // len(x), dim=0) for x in (keys, values))
    output = []
    parts = zip(packed.runs, queries.split(asking, 1), keys.split(seen, 1), values.split(seen, 1), strict=True)
    for (count, *size), q, k, v in parts:
        if count > 1:
            q, k, v = (x.unflatten(1, (count, -1)) for x in (q, k, v))
        mask = None if window == (-1, -1) else _mask(size[0], size[1], window, query.device)
        if size[1] > _LONG:
            shaped = (q, k, v) if count > 1 else (q[None], k[None], v[None])
            mixed = scaled_dot_product_attention(*shaped, mask, drop, scale=1.0).view(*q.shape[:-1], -1)
        else:
            weights = q @ k.transpose(-1, -2)
            weights = weights if mask is None else weights.masked_fill_(~mask, -torch.inf)
            weights = weights.softmax(dim=-1)
            mixed = (dropout(weights, drop) if drop else weights) @ v
        output.append(mixed.permute(1, 2, 0, 3).flatten(0, 1) if count > 1 else mixed.transpose(0, 1))
    return torch.cat(output)


def _mask(queries: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return True where a query sees a key, shape (queries, keys), the last query at the last key; None for all."""
    before, after = (keys if reach < 0 else reach for reach in window)
    if before >= keys - 1 and after >= keys - 1:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    return (distance >= -before) & (distance <= after)


# Equal to sdpa for ordinary batches; packed rows are passed by the keyword `packed`.
AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
