"""The jitted operators and the shapes with which a model's layers call them once sizes are padded to buckets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssm_configs.model_dims import ModelDims

from ._warmup_jitted import Jitted, jitted
from .bucket import TILE, bucket

Shapes = dict[str, jax.ShapeDtypeStruct]


def buckets(most: int, smallest: int = 16) -> list[int]:
    """Every `bucket` that sizes from 1 to `most` are padded to."""
    if isinstance(most, bool) or not isinstance(most, int):
        raise TypeError(f"most: expected an int, got {type(most).__name__}")
    if most < 1:
        raise ValueError(f"most: expected at least 1, got {most}")
    found = [bucket(1, smallest)]
    while found[-1] < most:
        found.append(bucket(found[-1] + 1, smallest))
    return found


class Program(NamedTuple):
    name: str
    function: Jitted
    shapes: Shapes


@dataclass(frozen=True)
class Request:
    """What is to be warmed, checked."""

    dims: ModelDims
    max_tokens: int
    max_batch: int
    ops: tuple[str, ...]
    forms: tuple[str, ...]
    entries: tuple[str, ...]
    sequences: tuple[int, ...]
    slots: int
    speculative: int
    implementation: str | None

    @property
    def options(self) -> dict[str, Any]:
        return {"implementation": self.implementation}

    @property
    def conv_rows(self) -> int:
        return self.dims.conv_width - 1 + self.speculative


def make_programs(request: Request) -> Iterator[Program]:
    dims = request.dims
    makers = {
        "causal_conv1d": _conv_prefill,
        "causal_conv1d_update": _conv_update,
        "mamba_chunk_scan_combined": _scan,
        "selective_state_update": _state_update,
        "chunk_gated_delta_rule": _delta_rule,
        "fused_recurrent_gated_delta_rule": _delta_rule_update,
    }
    layers = [parts for parts, there in ((dims.mamba_parts, dims.has_mamba), (dims.gdn_parts, dims.has_gdn)) if there]
    for op in request.ops:
        for parts in layers if op.startswith("causal") else (None,):
            for name, options, shapes, about in makers[op](request, parts):
                yield Program(f"{name}, {about}", jitted(name, **options, **request.options), shapes)


_Made = Iterator[tuple[str, dict[str, Any], Shapes, str]]


def _of(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _of("int32", *shape)


def _prefills(request: Request) -> Iterator[tuple[str, int, int, bool, str]]:
    """(form, T, N_seq, whether there are states to start from, and all that in words)."""
    for T in buckets(request.max_tokens, TILE):
        for form in request.forms:
            for N_seq in request.sequences if form.startswith("packed") else (1,):
                for initial in (False,) if form == "dense" else (False, True):
                    about = f"{form}, {T} tokens of {N_seq} sequences{', resumed' * initial}"
                    yield form, T, N_seq, initial, about


def _decodes(request: Request) -> Iterator[tuple[int, int, str]]:
    """(sequences, tokens of each, 0 without speculation, and that in words)."""
    for tokens in (0, 1 + request.speculative) if request.speculative else (0,):
        for batch in buckets(request.max_batch):
            yield batch, tokens, f"{batch} sequences of {max(tokens, 1)}"


def _conv_weights(dims: ModelDims, D: int) -> Shapes:
    weights: Shapes = {"weight": _of(dims.parameter_dtype, D, dims.conv_width)}
    return weights | ({"bias": _of(dims.parameter_dtype, D)} if dims.conv_bias else {})


def _conv_prefill(request: Request, parts: Sequence[int]) -> _Made:
    dims, D, parts = request.dims, sum(parts), tuple(parts)
    for form, T, N_seq, initial, about in _prefills(request):
        shapes = _conv_weights(dims, D) | {"x": _of(dims.dtype, 1, T, D)}
        if form.startswith("packed"):
            shapes["cu_seqlens"] = _ints(N_seq + 1)
        if form == "packed":
            if initial:
                continue  # has_initial_state says so: one program for both
            shapes |= {
                "conv_state": _of(dims.dtype, request.slots, request.conv_rows, D),
                "state_indices": _ints(N_seq),
            }
            shapes["has_initial_state"] = _of("bool", N_seq)
        elif initial:
            shapes["initial_state"] = _of(dims.dtype, N_seq, dims.conv_width - 1, D)
        for entry in request.entries:
            options: dict[str, Any] = {"activation": "silu"}
            if entry != "plain":
                aligned = entry == "aligned" and parts == dims.mamba_parts
                options |= {"sizes": parts, "chunk_size": dims.chunk_size if aligned else None}
            op = "causal_conv1d" if entry == "plain" else "causal_conv1d_split"
            yield op, options, shapes, f"{about}, {entry}"


def _conv_update(request: Request, parts: Sequence[int]) -> _Made:
    dims, D = request.dims, sum(parts)
    for batch, tokens, about in _decodes(request):
        shapes = _conv_weights(dims, D) | {
            "x": _of(dims.dtype, batch * max(tokens, 1), D),
            "conv_state": _of(dims.dtype, request.slots, request.conv_rows, D),
            "conv_state_indices": _ints(batch),
        }
        if tokens:
            shapes |= {"cu_seqlens": _ints(batch + 1), "num_accepted_tokens": _ints(batch)}
        yield "causal_conv1d_update", {"activation": "silu"}, shapes, about


def _scan(request: Request, _: Any) -> _Made:
    dims = request.dims
    H, G, P, N, L = dims.heads, dims.groups, dims.headdim, dims.dstate, dims.chunk_size
    for form, T, N_seq, initial, about in _prefills(request):
        for aligned in dict.fromkeys(entry == "aligned" for entry in request.entries):
            chunks = T // L + N_seq if form.startswith("packed") else -(-T // L)
            rows = L * chunks if aligned else T
            shapes: Shapes = {
                "x": _of(dims.dtype, 1, rows, H, P), "dt": _of(dims.dtype, 1, T, H), "A": _of("float32", H),
                "B": _of(dims.dtype, 1, rows, G, N), "C": _of(dims.dtype, 1, rows, G, N),
                "D": _of(dims.parameter_dtype, H), "dt_bias": _of(dims.parameter_dtype, H),
            }  # fmt: skip
            if dims.gate:
                shapes["z"] = _of(dims.dtype, 1, T, H, P)
            if form.startswith("packed"):
                shapes["cu_seqlens"] = _ints(N_seq + 1)
            if initial:
                shapes["initial_states"] = _of(dims.state_dtype, N_seq, H, P, N)
            options = {
                "chunk_size": L, "dt_softplus": True, "chunk_aligned": aligned, "return_final_states": form != "dense",
                "state_dtype": dims.state_dtype,
            }  # fmt: skip
            yield "mamba_chunk_scan_combined", options, shapes, f"{about}{', aligned' * aligned}"


def _state_update(request: Request, _: Any) -> _Made:
    dims = request.dims
    H, G, P, N = dims.heads, dims.groups, dims.headdim, dims.dstate
    for batch, tokens, about in _decodes(request):
        T = batch * max(tokens, 1)
        shapes: Shapes = {
            "state": _of(dims.state_dtype, request.slots, H, P, N), "x": _of(dims.dtype, T, H, P),
            "dt": _of(dims.dtype, T, H), "A": _of("float32", H), "B": _of(dims.dtype, T, G, N),
            "C": _of(dims.dtype, T, G, N), "D": _of(dims.parameter_dtype, H), "dt_bias": _of(dims.parameter_dtype, H),
        }  # fmt: skip
        if dims.gate:
            shapes["z"] = _of(dims.dtype, T, H, P)
        yield (
            "selective_state_update", {"dt_softplus": True}, shapes | _slots("state_batch_indices", batch, tokens), about
        )  # fmt: skip


def _delta_rule(request: Request, _: Any) -> _Made:
    dims = request.dims
    H_k, H_v, K, V = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim
    for form, T, N_seq, initial, about in _prefills(request):
        shapes: Shapes = {
            "q": _of(dims.dtype, 1, T, H_k, K), "k": _of(dims.dtype, 1, T, H_k, K), "v": _of(dims.dtype, 1, T, H_v, V),
            "g": _of("float32", 1, T, H_v), "beta": _of("float32", 1, T, H_v),
        }  # fmt: skip
        if form.startswith("packed"):
            shapes["cu_seqlens"] = _ints(N_seq + 1)
        if initial:
            shapes["initial_state"] = _of(dims.state_dtype, N_seq, H_v, K, V)
        options = {"use_qk_l2norm": dims.qk_l2norm, "return_final_state": form != "dense"}
        yield "chunk_gated_delta_rule", options, shapes, about


def _delta_rule_update(request: Request, _: Any) -> _Made:
    dims = request.dims
    H_k, H_v, K, V = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim
    raw = dims.gates_in_kernel
    for batch, tokens, about in _decodes(request):
        T, gates = batch * max(tokens, 1), dims.dtype if raw else "float32"
        shapes: Shapes = {
            "q": _of(dims.dtype, T, H_k, K), "k": _of(dims.dtype, T, H_k, K), "v": _of(dims.dtype, T, H_v, V),
            "g": _of(gates, T, H_v), "beta": _of(gates, T, H_v), "state": _of(dims.state_dtype, request.slots, H_v, K, V),
        }  # fmt: skip
        if raw:
            shapes |= {"A_log": _of("float32", H_v), "dt_bias": _of(dims.parameter_dtype, H_v)}
        options = {"use_qk_l2norm": dims.qk_l2norm, "sigmoid_beta": raw}
        yield "fused_recurrent_gated_delta_rule", options, shapes | _slots("state_indices", batch, tokens), about


def _slots(name: str, batch: int, tokens: int) -> Shapes:
    if not tokens:
        return {name: _ints(batch)}
    return {name: _ints(batch, tokens), "cu_seqlens": _ints(batch + 1), "num_accepted_tokens": _ints(batch)}
