"""Random operands as a model's layers hand them to the operators: as small as they can be, and lying as they will."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ssm_configs.model_dims import ModelDims

SLOTS = 4
Tensors = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the tensors of one call lie in memory."""

    projected: bool
    """Columns of one projection of the layer's input, rather than dense."""
    rows_before: int = 0
    """Rows of a mixed batch before the first of this call's slice."""
    entries_before: int = 0
    """Likewise, of its index tensors."""


class Draw:
    """Draws from a generator of its own: the process's random state is the user's."""

    def __init__(self, dims: ModelDims, device: torch.device, layout: Layout) -> None:
        self.dims, self.device, self.layout = dims, device, layout
        self._generator = torch.Generator(device).manual_seed(0)

    def floats(self, *shape: int, dtype: str = "") -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device)
        return values.to(getattr(torch, dtype or self.dims.dtype))

    def parameters(self, *shape: int) -> torch.Tensor:
        return self.floats(*shape, dtype=self.dims.parameter_dtype)

    def rows(self, count: int, widths: Sequence[int]) -> list[torch.Tensor]:
        """[count, width] for each width."""
        first = self.layout.rows_before
        if self.layout.projected:
            block = self.floats(first + count, sum(widths))
            return [part[first:] for part in block.split(list(widths), dim=1)]
        return [self.floats(first + count, width)[first:] for width in widths]

    def indices(self, values: Sequence[Any]) -> torch.Tensor:
        """int32 (or bool) entries, as many before them as the layout says."""
        dtype = torch.bool if isinstance(values[0], bool) else torch.int32
        before = self.layout.entries_before
        return torch.tensor([*[values[0]] * before, *values], dtype=dtype, device=self.device)[before:]

    def bounds(self, *lengths: int) -> torch.Tensor:
        """cu_seqlens. Servers compute them for each batch, so they are slices of nothing."""
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return torch.tensor(ends, dtype=torch.int32, device=self.device)


def signature(tensors: Tensors) -> tuple:
    """What Triton may specialise a kernel on, of these arguments: presence, dtype, alignment, divisibility of strides."""
    return tuple(
        (
            name,
            tensor.dtype,
            tensor.dim(),
            tensor.data_ptr() % 16 == 0,
            tuple((stride % 16 == 0, stride == 1) for stride in tensor.stride()),
        )
        if isinstance(tensor, torch.Tensor)
        else (name, tensor)
        for name, tensor in tensors.items()
    )


def layouts(sliced: bool) -> Iterator[Layout]:
    """Those to try; most of them come to the same signature.

    Of 16-bit elements every eighth row is aligned to 16 bytes whatever its width, of int32 entries every fourth, and every
    second pair of them; a bool is where it was only after sixteen.
    """
    for rows in range(8 if sliced else 1):
        for entries in (0, 1, 2, 4) if sliced else (0,):
            for projected in (True, False):
                yield Layout(projected, rows, entries)


def conv_weights(draw: Draw, channels: int) -> Tensors:
    dims = draw.dims
    return {
        "weight": draw.parameters(channels, dims.conv_width),
        "bias": draw.parameters(channels) if dims.conv_bias else None,
        "activation": "silu",
    }


def conv_prefill(
    draw: Draw, parts: tuple[int, ...], others: tuple[int, ...], form: str, initial: bool, T: int, rows: int
) -> Tensors:
    """Of `causal_conv1d`: `parts` are the channels it convolves, `others` what else the projection holds, before and after.

    `rows`: of a slot of the pool.
    """
    D = sum(parts)
    x = draw.rows(T, (others[0], D, *others[1:]))[1]
    tensors: Tensors = {"x": x[None], **conv_weights(draw, D)}
    if form.startswith("packed"):
        tensors["cu_seqlens"] = draw.bounds(T - T // 2, T // 2)
    if form == "packed":
        tensors |= {"conv_state": draw.floats(SLOTS, rows, D), "state_indices": draw.indices([1, 2])}
        tensors["has_initial_state"] = draw.indices([initial, False])
    elif initial:
        sequences = 2 if form.startswith("packed") else 1
        tensors["initial_state"] = draw.floats(sequences, draw.dims.conv_width - 1, D)
    return tensors


def conv_update(
    draw: Draw, parts: tuple[int, ...], others: tuple[int, ...], batch: int, tokens: int, rows: int
) -> Tensors:
    """Of `causal_conv1d_update`: `tokens` of each of `batch` sequences, 0 for one without speculation."""
    D = sum(parts)
    x = draw.rows(batch * max(tokens, 1), (others[0], D, *others[1:]))[1]
    tensors: Tensors = {"x": x, "conv_state": draw.floats(SLOTS, rows, D), **conv_weights(draw, D)}
    tensors["conv_state_indices"] = draw.indices([1, 2][:batch])
    if tokens:
        tensors["cu_seqlens"] = draw.bounds(*[tokens] * batch)
        tensors["num_accepted_tokens"] = draw.indices([1] * batch)
    return tensors


def scan(draw: Draw, form: str, entry: str, initial: bool, T: int) -> Tensors:
    """Of `mamba_chunk_scan_combined`, x, B and C as the convolution of this entry leaves them."""
    dims = draw.dims
    H, G, P, N, L = dims.heads, dims.groups, dims.headdim, dims.dstate, dims.chunk_size
    packed, states = form.startswith("packed"), getattr(torch, dims.state_dtype)
    sequences = 2 if packed else 1
    rows = T if entry != "aligned" else L * (T // L + 2) if packed else L * -(-T // L)
    if entry == "plain":
        x, B, C = draw.floats(1, rows, sum(dims.mamba_parts)).split(list(dims.mamba_parts), dim=2)
    else:
        x, B, C = (draw.floats(1, rows, width) for width in dims.mamba_parts)
    z, _, dt = draw.rows(T, (H * P, sum(dims.mamba_parts), H))
    tensors: Tensors = {
        "x": x.unflatten(2, (H, P)), "dt": dt[None], "A": -draw.floats(H, dtype="float32").abs() - 1,
        "B": B.unflatten(2, (G, N)), "C": C.unflatten(2, (G, N)), "chunk_size": L,
        "D": draw.parameters(H), "dt_bias": draw.parameters(H), "dt_softplus": True, "state_dtype": states,
        "chunk_aligned": entry == "aligned", "z": z.unflatten(1, (H, P))[None] if dims.gate else None,
    }  # fmt: skip
    if packed:
        tensors["cu_seqlens"] = draw.bounds(T - T // 2, T // 2)
    if initial:
        tensors["initial_states"] = draw.floats(sequences, H, P, N, dtype=dims.state_dtype)
    if form == "packed":
        tensors |= {
            "final_states_out": draw.floats(SLOTS, H, P, N, dtype=dims.state_dtype),
            "final_state_indices": draw.indices([1, 2]),
        }
    else:
        tensors["return_final_states"] = form.endswith("states")
    return tensors


def state_update(draw: Draw, batch: int, tokens: int, seed: int | None) -> Tensors:
    """Of `selective_state_update`: x, B and C are columns of what the convolution wrote."""
    dims = draw.dims
    H, G, P, N = dims.heads, dims.groups, dims.headdim, dims.dstate
    count = batch * max(tokens, 1)
    z, _, dt = draw.rows(count, (H * P, sum(dims.mamba_parts), H))
    x, B, C = draw.floats(count, sum(dims.mamba_parts)).split(list(dims.mamba_parts), dim=1)
    tensors: Tensors = {
        "state": draw.floats(SLOTS, H, P, N, dtype=dims.state_dtype), "x": x.unflatten(1, (H, P)), "dt": dt,
        "A": -draw.floats(H, dtype="float32").abs() - 1, "B": B.unflatten(1, (G, N)), "C": C.unflatten(1, (G, N)),
        "D": draw.parameters(H), "dt_bias": draw.parameters(H), "dt_softplus": True,
        "z": z.unflatten(1, (H, P)) if dims.gate else None, "rounding_seed": seed,
    }  # fmt: skip
    return tensors | _slots(draw, "state_batch_indices", batch, tokens)


def delta_rule(draw: Draw, form: str, entry: str, initial: bool, lengths: tuple[int, ...]) -> Tensors:
    """Of `chunk_gated_delta_rule`, for sequences of these lengths, equal ones unless packed."""
    dims, packed = draw.dims, form.startswith("packed")
    B, T = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    heads = ((dims.key_heads, dims.key_dim), (dims.key_heads, dims.key_dim), (dims.value_heads, dims.value_dim))
    if entry == "plain":
        qkv = draw.floats(B, T, sum(dims.gdn_parts)).split(list(dims.gdn_parts), dim=2)
    else:
        qkv = [draw.floats(B, T, width) for width in dims.gdn_parts]
    q, k, v = (part.unflatten(2, shape) for part, shape in zip(qkv, heads, strict=True))
    tensors: Tensors = {
        "q": q, "k": k, "v": v, "g": -draw.floats(B, T, dims.value_heads, dtype="float32").abs(),
        "beta": draw.floats(B, T, dims.value_heads, dtype="float32").sigmoid(), "use_qk_l2norm": dims.qk_l2norm,
        "return_final_state": form != "dense",
    }  # fmt: skip
    if packed:
        tensors["cu_seqlens"] = draw.bounds(*lengths)
    if initial:
        shape = (len(lengths), dims.value_heads, dims.key_dim, dims.value_dim)
        tensors["initial_state"] = draw.floats(*shape, dtype=dims.state_dtype)
    return tensors


def delta_rule_update(draw: Draw, batch: int, tokens: int) -> Tensors:
    """Of `fused_recurrent_gated_delta_rule`: q, k and v are columns of what the convolution wrote."""
    dims = draw.dims
    K, V, H_k, H_v = dims.key_dim, dims.value_dim, dims.key_heads, dims.value_heads
    count = batch * max(tokens, 1)
    q, k, v = draw.floats(count, sum(dims.gdn_parts)).split(list(dims.gdn_parts), dim=1)
    tensors: Tensors = {"q": q.unflatten(1, (H_k, K)), "k": k.unflatten(1, (H_k, K)), "v": v.unflatten(1, (H_v, V))}
    if dims.gates_in_kernel:
        beta, g = draw.rows(count, (H_v, H_v))
        tensors |= {"g": g, "beta": beta, "sigmoid_beta": True}
        tensors |= {"A_log": draw.floats(H_v, dtype="float32"), "dt_bias": draw.parameters(H_v)}
    else:
        tensors["g"] = -draw.floats(count, H_v, dtype="float32").abs()
        tensors["beta"] = draw.floats(count, H_v, dtype="float32").sigmoid()
    tensors |= {"state": draw.floats(SLOTS, H_v, K, V, dtype=dims.state_dtype), "use_qk_l2norm": dims.qk_l2norm}
    return tensors | _slots(draw, "state_indices", batch, tokens)


def _slots(draw: Draw, name: str, batch: int, tokens: int) -> Tensors:
    if not tokens:
        return {name: draw.indices([1, 2][:batch])}
    # A row of slots is as long as a sequence has tokens at most; rows before the slice have as many.
    before = draw.layout.entries_before
    slots = torch.ones((before + batch, tokens), dtype=torch.int32, device=draw.device)
    slots[before:] = torch.arange(batch * tokens, device=draw.device).view(batch, tokens) % SLOTS
    return {
        name: slots[before:],
        "cu_seqlens": draw.bounds(*[tokens] * batch),
        "num_accepted_tokens": draw.indices([1] * batch),
    }
