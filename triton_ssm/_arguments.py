"""From torch tensors to what the contracts check and what the kernels take. Nothing here synchronises with a GPU."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

_dispatch_of = operator.attrgetter("__torch_dispatch__")
_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int64: "int64",
}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


def is_memory(tensor: torch.Tensor) -> bool:
    """Not one that only stands for tensors elsewhere (a DTensor, say). Parameters and their like are, whatever their class."""
    return _dispatch_of(type(tensor)) is _dispatch_of(torch.Tensor)


def has_tangent(tensor: Any) -> bool:
    """Whether forward-mode differentiation goes through it."""
    return isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None


def check_tensors(tensors: Mapping[str, Any], op: str, required: int = 0) -> None:
    """All tensors, the first `required` of them there, all on one device, none asking for a gradient."""
    for name in list(tensors)[:required]:
        if tensors[name] is None:
            raise TypeError(f"{name}: expected a torch.Tensor, got NoneType")
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        _check_memory(name, tensor)
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, where the first argument is, got {tensor.device}")
        if (tensor.requires_grad and torch.is_grad_enabled()) or has_tangent(tensor):
            raise RuntimeError(
                f"{name}: {op} has no backward in triton_ssm; call it under torch.no_grad(), or detach {name} if no "
                "gradient is wanted"
            )


def _check_memory(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or not is_memory(tensor):
        kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
        raise TypeError(f"{name}: expected a strided torch.Tensor with memory of its own, got {kind}")


def checked[Dims](check: Callable[..., Dims], tensors: Mapping[str, Any], **options: Any) -> Dims:
    """`check` on the tensors' shapes and dtype names."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return check(
        {name: tuple(tensor.shape) for name, tensor in given.items()},
        {name: dtype_name(tensor.dtype) for name, tensor in given.items()},
        **options,
    )


def check_slots_on_host(name: str, slots: torch.Tensor | None, S: int) -> None:
    """What an index tensor holds, where looking costs no synchronisation: on the CPU."""
    if slots is not None and slots.device.type == "cpu" and slots.numel() and int(slots.max()) >= S:
        raise ValueError(f"{name}: expected slots < S={S}, got {int(slots.max())}")


def check_bounds_on_host(bounds: torch.Tensor | None, T: int) -> None:
    """Likewise for cu_seqlens."""
    if bounds is None or bounds.device.type != "cpu":
        return
    if bounds[0] != 0 or (bounds.diff() < 0).any() or bounds[-1] > T:
        raise ValueError(f"cu_seqlens: expected 0 <= … <= T={T} without a descent, got {bounds.tolist()}")


def is_expanded(tensor: torch.Tensor | None, rank: int, axes: int) -> bool:
    """Whether `tensor` has `rank` axes, of which the last `axes` repeat one element."""
    if tensor is None or tensor.dim() != rank:
        return False
    return rank >= axes and all(
        size and not stride for size, stride in zip(tensor.shape[-axes:], tensor.stride()[-axes:], strict=True)
    )


def collapse(axes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Drops the last `axes` axes of an expanded tensor."""
    return lambda tensor: tensor[(..., *(0,) * axes)]


def then_dense(view: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.Tensor.contiguous if view is None else lambda tensor: view(tensor).contiguous()


def is_dense(tensor: torch.Tensor | None) -> bool:
    return tensor is None or tensor.is_contiguous()


def has_dense_rows(tensor: torch.Tensor | None) -> bool:
    """Whether every row (all axes but the first) is dense."""
    return tensor is None or tensor.shape[0] == 0 or tensor[0].is_contiguous()


def row_stride(tensor: torch.Tensor | None) -> int:
    """Elements from one row to the next."""
    if tensor is None:
        return 0
    # A single row has no stride to speak of, and an arbitrary one would key a compile of its own.
    return tensor.stride(0) if tensor.shape[0] > 1 else max(1, tensor.numel())


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it where its rows (all axes but the first) are not dense."""
    return tensor if has_dense_rows(tensor) else tensor.contiguous()


def check_dense_channels(name: str, state: torch.Tensor) -> None:
    """A state that is updated in place cannot be copied and stay it."""
    if state.numel() and state.shape[-1] > 1 and state.stride(-1) != 1:
        raise ValueError(f"{name}: expected dense channels, got strides {state.stride()}")
    check_apart(name, state)


def check_apart(name: str, written: torch.Tensor) -> None:
    """That no two elements of what is written lie in one place, as those of an expanded view do."""
    extent = 1
    for stride, size in sorted(zip(written.stride(), written.shape, strict=True)):
        if size > 1 and stride < extent and written.numel():
            raise ValueError(f"{name}: expected elements that do not overlap, got strides {written.stride()}")
        extent += (size - 1) * stride


def check_output(out: torch.Tensor) -> None:
    """Of a caller's buffer, whatever its shape."""
    _check_memory("out", out)
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "out: what is written has no backward in triton_ssm; call it under torch.no_grad(), or give a tensor that "
            "asks for no gradient"
        )
    check_apart("out", out)


def state_strides(state: torch.Tensor | None) -> tuple[int, int]:
    """Elements from slot to slot and from row to row of [S,L,D]."""
    if state is None:
        return 0, 0
    S, L, D = state.shape
    row = state.stride(1) if L > 1 else D
    return state.stride(0) if S > 1 else L * row, row


def output_like(x: torch.Tensor, out: Any, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """The buffer for y, of x's shape or another: `out`, if it fits, else a new one."""
    shape = x.shape if shape is None else shape
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: expected a torch.Tensor, got {type(out).__name__}")
    if out.device != x.device:
        raise ValueError(f"out: expected device {x.device}, where the first argument is, got {out.device}")
    if out.dtype != x.dtype:
        raise TypeError(f"out: expected the dtype of x, {dtype_name(x.dtype)}, got {dtype_name(out.dtype)}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {tuple(shape)}, got {tuple(out.shape)}")
    if out.shape[0] and not out[0].is_contiguous():
        raise ValueError(f"out: expected every row dense, got strides {out.stride()}")
    check_output(out)
    return out


def seed_tensor(seed: Any, device: torch.device) -> torch.Tensor | None:
    """The seed as one int64 on `device`, without a copy from the host: a fill can be captured in a graph."""
    if seed is None:
        return None
    if isinstance(seed, torch.Tensor):
        if seed.numel() != 1 or seed.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"rounding_seed: expected one int32 or int64 element, got shape {tuple(seed.shape)} "
                f"{dtype_name(seed.dtype)}"
            )
        if seed.device != device:
            raise ValueError(f"rounding_seed: expected device {device}, where the first argument is, got {seed.device}")
        # An int32 is 32 bits of seed, not a number to sign-extend into the upper half of the key.
        return seed if seed.dtype == torch.int64 else seed.to(torch.int64) & 0xFFFFFFFF
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"rounding_seed: expected an int, a one-element integer tensor or None, got {type(seed).__name__}"
        )
    if not 0 <= seed < 2**64:
        raise ValueError(f"rounding_seed: expected 0 <= seed < 2**64, got {seed}")
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
