"""`gdn_prepare`'s Gluon source, run on NumPy, against float64: what it computes, not how that is laid out and synchronised.

Gluon has no interpreter. Its functions are Python all the same, so a stand-in for its language, in which a tensor is an array,
shared memory is an array and a layout is nothing, runs one program after the other. Products round as tensor cores do.
"""

import builtins
import itertools
import math
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from ssm_configs.contracts.gdn import Dims
from triton_ssm._numerics import LOG2E
from triton_ssm.gdn import _prepare

BF16 = np.dtype(ml_dtypes.bfloat16)
_FOLDER = Path(_prepare.__file__).parent


class Tensor:
    def __init__(self, value: Any):
        self.value = np.asarray(value)
        self.type = types.SimpleNamespace(layout=None)

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)

    def to(self, dtype: Any, bitcast: bool = False) -> "Tensor":
        return Tensor(self.value.view(dtype) if bitcast else self.value.astype(dtype))

    def __getitem__(self, index: Any) -> "Tensor":
        return Tensor(self.value[index])

    def __index__(self) -> int:
        return int(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.value)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Tensor) else x


def _operator(name: str) -> Any:
    return lambda self, other: Tensor(getattr(self.value, name)(_value(other)))


for _name in "add sub mul floordiv mod lt le gt ge eq and radd rsub rmul".split():
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """To elements of a flat array."""

    def __init__(self, memory: np.ndarray, offset: Any = 0):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, elements: Any) -> "Pointer":
        return Pointer(self.memory, np.asarray(self.offset, np.int64) + _value(elements))


class Shared:
    def __init__(self, value: np.ndarray):
        self.value = value

    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.value[(*[slice(None)] * dim, slice(start, start + length))])

    def index(self, i: int) -> "Shared":
        return Shared(self.value[i])

    def permute(self, order: Any) -> "Shared":
        return Shared(self.value.transpose(order))

    def reshape(self, shape: Any) -> "Shared":
        view = self.value.view()
        view.shape = tuple(shape)  # and no copy
        return Shared(view)

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> "Shared":
        return self.reshape(shape)

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.value.copy())

    def store(self, tensor: Tensor) -> None:
        assert (self.value.shape, self.value.dtype) == (tensor.shape, tensor.dtype)
        self.value[...] = tensor.value


class Language:
    """`gl`: what the kernel uses of it."""

    program = 0
    float32, int32, int64, bfloat16 = np.dtype("f4"), np.dtype("i4"), np.dtype("i8"), BF16
    BlockedLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout = SwizzledSharedLayout = lambda *_: None
    NVMMASharedLayout = types.SimpleNamespace(get_default_for=lambda *_: None)
    constexpr = staticmethod(lambda value: value)
    static_range = range

    @classmethod
    def program_id(cls, axis: int) -> Tensor:
        return Tensor(np.int32(cls.program))

    arange = staticmethod(lambda begin, end, layout=None: Tensor(np.arange(begin, end, dtype=np.int32)))
    zeros = staticmethod(lambda shape, dtype, layout: Tensor(np.zeros(tuple(shape), dtype)))
    reshape = staticmethod(lambda x, shape: Tensor(x.value.reshape(shape)))
    permute = staticmethod(lambda x, order: Tensor(x.value.transpose(order)))
    expand_dims = staticmethod(lambda x, axis: Tensor(np.expand_dims(x.value, axis)))
    join = staticmethod(lambda a, b: Tensor(np.stack([a.value, b.value], -1)))
    split = staticmethod(lambda x: (Tensor(x.value[..., 0]), Tensor(x.value[..., 1])))
    sum = staticmethod(lambda x, axis: Tensor(x.value.sum(axis, dtype=x.dtype)))
    exp2 = staticmethod(lambda x: Tensor(np.exp2(x.value)))
    rsqrt = staticmethod(lambda x: Tensor((1 / np.sqrt(x.value)).astype(np.float32)))
    associative_scan = staticmethod(lambda x, axis, add: Tensor(np.cumsum(x.value, axis, dtype=x.dtype)))
    minimum = staticmethod(lambda a, b: Tensor(np.minimum(_value(a), _value(b))))
    maximum = staticmethod(lambda a, b: Tensor(np.maximum(_value(a), _value(b))))
    convert_layout = staticmethod(lambda x, layout: x)
    thread_barrier = staticmethod(lambda: None)
    # The one use: bf16 to fp32.
    inline_asm_elementwise = staticmethod(lambda asm, constraints, args, dtype, is_pure, pack: args[0].to(dtype))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Tensor:
        dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), np.float32)
        return Tensor(np.where(_value(condition), _value(a), _value(b)).astype(dtype))

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Any, layout: Any, value: Any = None) -> Shared:
        room = Shared(np.full(tuple(shape), math.nan).astype(dtype))
        if value is not None:
            room.store(value)
        return room

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
        mask = np.broadcast_to(_value(mask), np.shape(pointer.offset))
        found = pointer.memory[np.where(mask, pointer.offset, 0)]
        return Tensor(np.where(mask, found, np.asarray(other, found.dtype)))

    @staticmethod
    def store(pointer: Pointer, tensor: Tensor) -> None:
        assert np.shape(pointer.offset) == tensor.shape and np.min(pointer.offset) >= 0
        pointer.memory[pointer.offset] = tensor.value.astype(pointer.memory.dtype)


def _tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.int32) & -0x2000).view(np.float32)


def _warpgroup_mma(a: Shared, b: Shared, sums: Tensor, use_acc: bool, is_async: bool) -> Tensor:
    return Tensor(a.value.astype(np.float32) @ b.value.astype(np.float32))


def _gluon() -> Any:
    def jit(function: Any = None, **options: Any) -> Any:
        return function or jit

    return types.SimpleNamespace(
        gluon=types.SimpleNamespace(jit=jit, constexpr_function=jit),
        language=Language,
        mma_v2=lambda a, b, sums, input_precision: Tensor(sums.value + _tf32(a.value) @ _tf32(b.value)),
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_wait=lambda pendings, deps: deps if len(deps) > 1 else deps[0],
        fence_async_shared=lambda: None,
        async_copy=types.SimpleNamespace(
            async_copy_global_to_shared=lambda tile, pointer, mask: tile.store(Language.load(pointer, mask)),
            commit_group=lambda: None,
            wait_group=lambda outstanding: None,
        ),
    )


def _run(name: str, level: int = 1) -> Any:
    """The module of this name, with the stand-in for Gluon."""

    def load(name: str, globals_: Any = None, locals_: Any = None, names: Any = (), level: int = 0) -> Any:
        if name == "_numerics":  # Triton's, whose numbers are all that is taken
            return types.SimpleNamespace(LOG2E=LOG2E.value)
        return _run(name, level) if level else _gluon()

    path = (_FOLDER if level == 1 else _FOLDER.parent) / f"{name.replace('.', '/')}.py"
    module: dict[str, Any] = {"__name__": name, "__builtins__": vars(builtins) | {"__import__": load}}
    exec(compile(path.read_text(), path, "exec"), module)
    return types.SimpleNamespace(**module)


KERNEL, INVERSE = _run("_prepare_kernel"), _run("_prepare_inverse")


@pytest.fixture(autouse=True)
def numpy_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def pointer(tensor: torch.Tensor | None) -> Pointer | None:
        if tensor is None:
            return None
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        flat = whole.view(torch.int16).numpy().view(BF16) if tensor.dtype == torch.bfloat16 else whole.numpy()
        return Pointer(flat, tensor.storage_offset())

    def launch(key: Any, grid: Any, arguments: Any, constants: Any, num_warps: int) -> None:
        given = [pointer(a) if a is None or isinstance(a, torch.Tensor) else Tensor(np.int32(a)) for a in arguments]
        for Language.program in range(grid[0]):
            with np.errstate(over="ignore", invalid="ignore"):
                KERNEL.gdn_prepare_kernel(*given, *constants)

    monkeypatch.setattr(_prepare, "_PREPARE", launch)


def _gap(x: torch.Tensor) -> torch.Tensor:
    """A view of it with rows that lie further apart, between NaN, at an odd place."""
    B, T, *row = x.shape
    wide = torch.full((B, T, math.prod(row) + 3), math.nan, dtype=x.dtype)
    wide[:, :, 1:-2] = x.reshape(B, T, -1)
    return wide[:, :, 1:-2].unflatten(2, row)


def check(
    lengths: tuple[int, ...], *, packed: bool = False, B: int = 1, heads: int = 2, H: tuple[int, int] = (1, 2), K: int = 64,
    V: int = 64, l2norm: bool = True, dtype: torch.dtype = torch.bfloat16, alike: bool = False, tail: int = 0,
    gates_within: tuple[float, float] = (-0.3, 0.1), gap: bool = False,
) -> None:  # fmt: skip
    (H_k, H_v), T, draw = H, sum(lengths) + tail, torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H_k, K, generator=draw) for _ in range(2))
    v, beta = torch.randn(B, T, H_v, V, generator=draw), torch.rand(B, T, H_v, generator=draw)
    g = torch.empty(B, T, H_v).uniform_(*gates_within, generator=draw)
    if alike:
        k, beta, g = torch.randn(1, 1, H_k, K, generator=draw) + 0.01 * k, torch.ones_like(beta), 1e-5 * g
    if not l2norm:
        k = k / k.norm(dim=-1, keepdim=True)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for x in (q, k, v, g, beta):
        x[:, sum(lengths) :] = math.nan
    if gap:
        q, k, v, g, beta = map(_gap, (q, k, v, g, beta))
    bounds = list(itertools.accumulate(lengths, initial=0))
    NC = T // 64 + len(lengths) if packed else -(-T // 64)
    dims = Dims(B, T, H_k, H_v, K, V, 64, NC, len(lengths) if packed else B, packed)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    strides = {name: (x.stride(0), x.stride(1)) for name, x in tensors.items()}
    slots = B * NC
    out = [
        torch.full((slots, h, 64, n), math.nan, dtype=dtype)
        for h, n in ((H_k, K), (H_k, K), (H_v, K), (H_v, V), (H_v, 64))
    ]
    gates = torch.full((slots, H_v, 2, 64), math.nan)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    written: Any = (*out, gates)
    _prepare.launch((), dims, {"HEADS": heads}, strides, l2norm, q, k, v, g, beta, cu_seqlens, *written)

    if packed:
        chunks = {
            bounds[n] // 64 + n + c: (0, bounds[n] + 64 * c, min(64, length - 64 * c))
            for n, length in enumerate(lengths) for c in range(-(-length // 64))
        }  # fmt: skip
    else:
        chunks = {b * NC + c: (b, 64 * c, min(64, T - 64 * c)) for b in range(B) for c in range(NC)}
    tolerance = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]

    def near(got: torch.Tensor, expected: torch.Tensor, times: float = 1.0) -> None:
        assert (got.double() - expected).abs().max() <= times * tolerance * expected.abs().max().clamp_min(1e-30)

    for slot in range(slots):
        if slot not in chunks:
            assert all(x[slot].isnan().all() for x in written)
            continue
        b, begin, length = chunks[slot]
        for h in range(H_v):
            group = h // (H_v // H_k)

            def rows(name: str, head: int, here: tuple[int, int, int] = (b, begin, length)) -> torch.Tensor:
                b, begin, length = here
                x = tensors[name][b, begin : begin + length, head].double()
                return torch.cat([x, x.new_zeros(64 - length, *x.shape[1:])])

            for name, got in (("q", out[0]), ("k", out[1])):
                x = rows(name, group)
                near(got[slot, group], x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() if l2norm else x)
            # All else from what they are rounded to.
            q_, k_ = (x[slot, group].double() for x in out[:2])
            beta_, G = rows("beta", h)[:, None], rows("g", h).cumsum(0)
            lower = torch.ones(64, 64, dtype=torch.bool).tril()
            decay = torch.where(lower, G[:, None] - G[None, :], 0).exp()
            near(out[4][slot, h], torch.where(lower, q_ @ k_.T * decay, 0))
            near(gates[slot, h, 0], G.exp(), 0.05)
            near(gates[slot, h, 1], (G[-1] - G).exp(), 0.05)
            A = torch.where(lower.tril(-1), k_ @ k_.T * decay * beta_, 0)
            X = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A).to(dtype).double()
            near(out[2][slot, h], X @ (beta_ * G.exp()[:, None] * k_).to(dtype).double(), 2)
            near(out[3][slot, h], X @ (beta_ * rows("v", h)).to(dtype).double(), 2)


@pytest.mark.parametrize("heads", [1, 2])
def test_dense(heads):
    check((100,), B=2, heads=heads, H=(2, 4))
    check((64,), heads=heads, V=128, l2norm=False, dtype=torch.float16)


@pytest.mark.parametrize("heads", [1, 2])
def test_packed_between_nan(heads):
    """Sequences of no and of few tokens; what lies behind the last is nobody's."""
    check((0, 70, 1, 0, 64, 30), packed=True, tail=40, heads=heads)
    check((0, 0), packed=True, tail=5, heads=heads)


def test_views_whose_tokens_lie_apart():
    check((70,), B=2, gap=True)
    check((3, 66), packed=True, gap=True, K=128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_that_resemble_each_other(dtype):
    check((64,), alike=True, dtype=dtype)


@pytest.mark.parametrize("gates_within", [(-0.5, 0.7), (-30.0, 0.0)])
def test_gates_of_either_sign(gates_within):
    """Above the diagonal exp(G[i] - G[j]) overflows where a gate is steep."""
    check((64,), gates_within=gates_within)


def test_three_heads_of_a_key_head():
    """Not to be had in pairs."""
    check((20,), H=(1, 3))


@pytest.mark.parametrize("heads", [1, 2])
def test_inverse_is_exact_to_fp32(heads):
    draw = np.random.default_rng(0)
    unit = draw.standard_normal((64, 64))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    signs = 1 - 2.0 * (np.arange(64) % 2)
    triangles = [
        np.ones((64, 64)), np.outer(signs, signs), np.full((64, 64), 0.97), unit @ unit.T, draw.uniform(0, 1, (64, 64)),
        draw.uniform(-0.3, 0.3, (64, 64)),
    ]  # fmt: skip
    for pair in itertools.batched(triangles, heads):
        lower = [np.tril(A, -1).astype(np.float32) for A in pair]
        room = INVERSE.room(heads)
        for r, A in enumerate(lower):
            INVERSE.put(Tensor(A), *room, r)
        X = INVERSE.invert(*room, heads).value
        for got, A in zip(X, lower, strict=True):
            exact = np.linalg.inv(np.eye(64) + A.astype(np.float64))
            assert np.abs(got - exact).max() <= 2e-6 * np.abs(exact).max()
