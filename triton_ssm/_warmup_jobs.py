"""The calls that bring a model's layers to every kernel variant that serving and training forward reach.

What keys a compile of a Triton kernel: its constexpr parameters, the dtype or absence of every tensor, whether a pointer is
divisible by 16, whether an integer that is specialised on (a stride within a row of tokens, between slots) is 1 or divisible by
16, and num_warps. Token counts, batches, slot counts and batch strides are not specialised on. A size's only say is the launch
config that it picks, so every config is pinned in turn on the smallest tensors that run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ssm_configs import Config, Device, explain, override
from ssm_configs.model_dims import ModelDims
from ssm_configs.models.sizes import reached_configs
from ssm_configs.models.warming import Job

from . import _warmup_operands as operands
from ._warmup_operands import Draw, Tensors, layouts, signature
from .causal_conv1d import causal_conv1d, causal_conv1d_split
from .causal_conv1d_update import causal_conv1d_update
from .gdn import _loop, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from .selective_state_update import selective_state_update
from .ssd import _fused, mamba_chunk_scan_combined

_GDN_CHUNK = 64
_SCAN = "mamba_chunk_scan_combined"
_STAGE_CHUNK = 128
# Tokens of a call: enough that rows have a distance from each other. One token is a case of its own.
_FEW = 4

Pins = dict[str, Config | dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What is to be warmed, checked."""

    dims: ModelDims
    device: torch.device
    target: Device
    max_tokens: int
    max_batch: int
    ops: tuple[str, ...]
    forms: tuple[str, ...]
    entries: tuple[str, ...]
    speculative: int
    stochastic_rounding: bool
    sliced: bool

    @property
    def conv_rows(self) -> int:
        """Of a slot of the pool of conv states."""
        return self.dims.conv_width - 1 + self.speculative

    def configs(self, op: str, *, dtype: str, unit: int, most: int, **static: int) -> list[Config]:
        found = reached_configs(op, twin="triton", device=self.target, dtype=dtype, unit=unit, most=most, **static)
        return list(found)


def make_jobs(request: Request) -> list[Job]:
    dims, jobs = request.dims, []
    # What a projection holds before and after the channels that are convolved: z and dt, or nothing and z.
    layers = []
    if dims.has_mamba:
        layers.append((dims.mamba_parts, (dims.heads * dims.headdim, dims.heads)))
    if dims.has_gdn:
        layers.append((dims.gdn_parts, (0, dims.value_heads * dims.value_dim)))
    for parts, others in layers:
        if "causal_conv1d" in request.ops:
            jobs += _conv_prefill(request, parts, others, aligned=parts == dims.mamba_parts)
        if "causal_conv1d_update" in request.ops:
            jobs += _conv_update(request, parts, others)
    if "mamba_chunk_scan_combined" in request.ops:
        jobs += _scan(request)
    if "selective_state_update" in request.ops:
        jobs += _state_update(request)
    if "chunk_gated_delta_rule" in request.ops:
        jobs += _delta_rule(request)
    if "fused_recurrent_gated_delta_rule" in request.ops:
        jobs += _delta_rule_update(request)
    return jobs


def _job(
    request: Request,
    op: str,
    about: str,
    pins: Pins,
    draws: Callable[[Draw], Iterator[Tensors]],
    call: Callable[[Tensors], Any],
) -> Job:
    """A job that makes the calls on whatever `draws` yields for each layout, but for those that come to the same thing."""

    def run() -> None:
        seen = set()
        with ExitStack() as stack, torch.no_grad():
            if request.device.type == "cuda":
                stack.enter_context(torch.cuda.device(request.device))  # each thread has a device of its own
            for name, knobs in pins.items():
                stack.enter_context(override(name, twin="triton", **dict(knobs)))
            for layout in layouts(request.sliced):
                for index, tensors in enumerate(draws(Draw(request.dims, request.device, layout))):
                    if (key := (index, signature(tensors))) not in seen:
                        seen.add(key)
                        call(tensors)
            if request.device.type == "cuda":
                torch.cuda.synchronize()  # or an error would surface somewhere else

    return Job(f"{op}, {about}", run)


def _initial(form: str) -> tuple[bool, ...]:
    """Without states to start from, and with them."""
    return (False,) if form == "dense" else (False, True)


def _conv_prefill(request: Request, parts: tuple[int, ...], others: tuple[int, ...], aligned: bool) -> Iterator[Job]:
    dims, D = request.dims, sum(parts)
    configs = request.configs("causal_conv1d", dtype=dims.dtype, unit=D, most=request.max_tokens, width=dims.conv_width)
    for config in configs:
        for form in request.forms:
            for entry in dict.fromkeys(
                entry if aligned or entry != "aligned" else "split" for entry in request.entries
            ):
                chunk_size = dims.chunk_size if entry == "aligned" else None

                def call(tensors: Tensors, entry: str = entry, chunk_size: int | None = chunk_size) -> None:
                    if entry == "plain":
                        causal_conv1d(**tensors)
                    else:
                        x, weight, *_ = tensors.values()
                        named = {name: value for name, value in tensors.items() if name not in ("x", "weight")}
                        causal_conv1d_split(x, weight, parts, chunk_size=chunk_size, **named)

                def draws(draw: Draw, form: str = form) -> Iterator[Tensors]:
                    for initial in _initial(form):
                        for T in (_FEW, 1):
                            yield operands.conv_prefill(draw, parts, others, form, initial, T, request.conv_rows)

                yield _job(
                    request, "causal_conv1d", f"{form}, {entry}, {config}", {"causal_conv1d": config}, draws, call
                )


def _conv_update(request: Request, parts: tuple[int, ...], others: tuple[int, ...]) -> Iterator[Job]:
    dims, D = request.dims, sum(parts)
    op = "causal_conv1d_update"
    for config in request.configs(op, dtype=dims.dtype, unit=D, most=request.max_batch, width=dims.conv_width):

        def draws(draw: Draw) -> Iterator[Tensors]:
            for batch, tokens in _decodes(request):
                yield operands.conv_update(draw, parts, others, batch, tokens, request.conv_rows)

        yield _job(request, op, str(config), {op: config}, draws, lambda tensors: causal_conv1d_update(**tensors))


def _decodes(request: Request) -> list[tuple[int, int]]:
    """(batch, tokens of each sequence, 0 where there is no speculation). A batch of one has strides of its own."""
    tokens = (0, 1 + request.speculative) if request.speculative else (0,)
    return [(batch, count) for count in tokens for batch in (2, 1)]


def _state_update(request: Request) -> Iterator[Job]:
    dims, op = request.dims, "selective_state_update"
    seed = 0 if request.stochastic_rounding else None
    sizes = {"headdim": dims.headdim, "dstate": dims.dstate}
    for config in request.configs(op, dtype=dims.state_dtype, unit=dims.heads, most=request.max_batch, **sizes):

        def draws(draw: Draw) -> Iterator[Tensors]:
            for batch, tokens in _decodes(request):
                yield operands.state_update(draw, batch, tokens, seed)

        yield _job(request, op, str(config), {op: config}, draws, lambda tensors: selective_state_update(**tensors))


def _scan(request: Request) -> Iterator[Job]:
    dims = request.dims
    sizes = {"nheads": dims.heads, "headdim": dims.headdim, "dstate": dims.dstate}
    found = reached_configs(
        _SCAN, twin="triton", device=request.target, dtype=dims.dtype, unit=1, most=request.max_tokens, **sizes
    )
    for form in request.forms:
        for entry in request.entries:
            fused: dict[tuple[int, int, int], None] = {}
            stages: list[Pins] = []
            for config, tokens in found.items():
                if config["FUSED"] and _takes_fused(request, form, entry):
                    # The number of pieces is no part of a variant, only whether there are some, and many.
                    fused |= {
                        (config["HEADS_PER_BLOCK"], config["num_stages"], kind): None
                        for kind in _kinds(config, tokens, form)
                    }
                else:
                    stages = stages or _stage_pins(request)
            for heads, depth, kind in fused:
                knobs = {
                    "FUSED": True,
                    "CHUNKS_PER_PIECE": 1,
                    "STATES_PER_PIECE": 1,
                    "HEADS_PER_BLOCK": heads,
                    "num_stages": depth,
                }
                yield _scan_job(request, form, entry, {_SCAN: knobs}, _TOKENS_OF_KIND[kind])
            for pins in stages:
                yield _scan_job(request, form, entry, pins, (_FEW, 1))


# One piece; pieces whose states the output kernel strings together; more than it does. In chunks of 64 tokens, one a piece.
_TOKENS_OF_KIND = (
    (_FEW, 1),
    (2 * _fused.CHUNK,),
    ((_fused._PIECES_WITHOUT_SCAN + 2) * _fused.CHUNK,),
)


def _kinds(config: Config, tokens: range, form: str) -> set[int]:
    """Of calls of so many tokens with this config."""
    piece = int(config["CHUNKS_PER_PIECE"])
    splits = math.gcd(piece, int(config["STATES_PER_PIECE"]))

    def kind(tokens: int) -> int:
        pieces = -(-tokens // (piece * _fused.CHUNK))
        if pieces == 1:
            return 0
        return 1 if (pieces - 1) * splits <= _fused._PIECES_WITHOUT_SCAN else 2

    # The tokens of a dense call may be those of many short rows.
    least = kind(tokens[0]) if form.startswith("packed") else 0
    return set(range(least, kind(tokens[-1]) + 1))


def _takes_fused(request: Request, form: str, entry: str) -> bool:
    from ._explain import explain as explain_call

    tensors = operands.scan(Draw(request.dims, request.device, operands.Layout(False)), form, entry, False, _FEW)
    with override(_SCAN, twin="triton", FUSED=True):
        return explain_call(_SCAN, **tensors).steps[-1].outcome == "fused"


def _stage_pins(request: Request) -> list[Pins]:
    dims, most = request.dims, request.max_tokens
    L = min(dims.chunk_size, _STAGE_CHUNK)
    H, P, N = dims.heads, dims.headdim, dims.dstate
    tile = {"headdim": P, "dstate": N, "chunk_size": L}
    wanted = {
        "ssd_chunk_cumsum": request.configs(
            "ssd_chunk_cumsum", dtype=dims.dtype, unit=1, most=most, nheads=H, chunk_size=L
        ),
        "ssd_chunk_state": request.configs("ssd_chunk_state", dtype=dims.dtype, unit=H, most=most, **tile),
        "ssd_state_passing": request.configs(
            "ssd_state_passing", dtype="float32", unit=H, most=request.max_batch, headdim=P, dstate=N
        ),
        "ssd_bmm_chunk": request.configs(
            "ssd_bmm_chunk", dtype=dims.dtype, unit=dims.groups, most=most, dstate=N, chunk_size=L
        ),
        "ssd_chunk_scan": request.configs("ssd_chunk_scan", dtype=dims.dtype, unit=H, most=most, **tile),
    }
    # The other knobs say nothing where this one is False.
    rest = explain(_SCAN, twin="triton", device=request.target, dtype=dims.dtype, size=1, nheads=H, headdim=P, dstate=N)
    return _side_by_side(wanted, {_SCAN: dict(rest.config) | {"FUSED": False}})


def _side_by_side(wanted: Mapping[str, Sequence[Config]], always: Pins) -> list[Pins]:
    """Every config of every stage at least once: stages are kernels of their own, so their configs need not meet."""
    length = max(len(configs) for configs in wanted.values())
    return [always | {op: configs[i % len(configs)] for op, configs in wanted.items()} for i in range(length)]


def _scan_job(request: Request, form: str, entry: str, pins: Pins, tokens: tuple[int, ...]) -> Job:
    def draws(draw: Draw) -> Iterator[Tensors]:
        for initial in _initial(form):
            for T in tokens:
                yield operands.scan(draw, form, entry, initial, T)

    about = f"{form}, {entry}, {tokens[0]} tokens, {pins[_SCAN]}"
    return _job(request, _SCAN, about, pins, draws, lambda tensors: mamba_chunk_scan_combined(**tensors))


def _delta_rule(request: Request) -> Iterator[Job]:
    dims, op = request.dims, "chunk_gated_delta_rule"
    sizes = {"K": dims.key_dim, "V": dims.value_dim, "chunk_size": _GDN_CHUNK}
    H, most = dims.value_heads, request.max_tokens
    # Beyond so many sequences the fused path's second kernel is another one.
    few = _loop.most_sequences(H, dims.value_dim)
    many = (1,) * (int(few) + 1) if math.isfinite(few) else None
    # Beyond so many tokens a dense sequence is one of segments, whose states more kernels find.
    long = _loop.fewest_tokens(H, dims.key_dim, dims.value_dim, most)

    def configs(name: str, most: int) -> list[Config]:
        return request.configs(name, dtype=dims.dtype, unit=H, most=most, **sizes)

    combined = configs(op, request.max_batch)
    wanted: dict[str, Sequence[Config]] = {"gdn_recompute_w_u": configs("gdn_recompute_w_u", most)}
    pins: list[Pins] = []
    if fused := [config for config in combined if config["FUSED"]]:
        pins += _side_by_side(wanted | {op: fused}, {})
    if staged := [config for config in combined if not config["FUSED"]]:
        wanted["gdn_chunk_delta_h"] = configs("gdn_chunk_delta_h", request.max_batch)
        wanted["gdn_chunk_o"] = configs("gdn_chunk_o", most)
        pins += _side_by_side(wanted | {op: staged}, {})
    for form in request.forms:
        for entry in dict.fromkeys("plain" if entry == "plain" else "split" for entry in request.entries):
            for pinned in pins:
                cut = long if pinned[op]["FUSED"] and not form.startswith("packed") else None

                def draws(draw: Draw, form: str = form, entry: str = entry, cut: int | None = cut) -> Iterator[Tensors]:
                    for initial in _initial(form):
                        if cut is not None:
                            yield operands.delta_rule(draw, form, entry, initial, (cut,))
                        for lengths in (
                            ((_FEW // 2, _FEW // 2), (1, 0)) if form.startswith("packed") else ((_FEW,), (1,))
                        ):
                            yield operands.delta_rule(draw, form, entry, initial, lengths)
                        if many is not None:
                            yield operands.delta_rule(draw, form, entry, initial, many)

                about = f"{form}, {entry}, {pinned[op]}"
                yield _job(request, op, about, pinned, draws, lambda tensors: chunk_gated_delta_rule(**tensors))


def _delta_rule_update(request: Request) -> Iterator[Job]:
    dims, op = request.dims, "fused_recurrent_gated_delta_rule"
    sizes = {"K": dims.key_dim, "V": dims.value_dim}
    for config in request.configs(op, dtype=dims.state_dtype, unit=dims.value_heads, most=request.max_batch, **sizes):

        def draws(draw: Draw) -> Iterator[Tensors]:
            for batch, tokens in _decodes(request):
                yield operands.delta_rule_update(draw, batch, tokens)

        yield _job(
            request, op, str(config), {op: config}, draws, lambda tensors: fused_recurrent_gated_delta_rule(**tensors)
        )
