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

from .compare import error
from .oracle import gdn as oracle
from .runners import to_torch
from .test_triton_gdn import draw

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
        value = np.broadcast_to(tensor.value, np.shape(pointer.offset))
        assert np.min(pointer.offset) >= 0
        pointer.memory[pointer.offset] = value.astype(pointer.memory.dtype)


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
        given = [
            pointer(a) if a is None or isinstance(a, torch.Tensor)
            else Tensor(np.float32(a) if isinstance(a, float) else np.int32(a))
            for a in arguments
        ]  # fmt: skip
        for Language.program in range(grid[0]):
            with np.errstate(over="ignore", invalid="ignore"):
                KERNEL.gdn_prepare_kernel(*given, *constants)

    monkeypatch.setattr(_prepare, "_PREPARE", launch)


def _gap(x: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """A view of it with rows that lie further apart, between NaN."""
    B, T, *row = x.shape
    wide = torch.full((B, T, before + math.prod(row) + behind), math.nan, dtype=x.dtype)
    wide[:, :, before:-behind] = x.reshape(B, T, -1)
    return wide[:, :, before:-behind].unflatten(2, row)


def check(
    lengths: tuple[int, ...], *, packed: bool = False, B: int = 1, heads: int = 2, H: tuple[int, int] = (1, 2), K: int = 64,
    l2norm: bool = True, dtype: torch.dtype = torch.bfloat16, alike: bool = False, tail: int = 0,
    gates_within: tuple[float, float] = (-0.3, 0.1), gap: tuple[int, int] | None = None, scale: float = 0.125,
) -> None:  # fmt: skip
    (H_k, H_v), T, draw = H, sum(lengths) + tail, torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H_k, K, generator=draw) for _ in range(2))
    beta = torch.rand(B, T, H_v, generator=draw)
    g = torch.empty(B, T, H_v).uniform_(*gates_within, generator=draw)
    if alike:
        k, beta, g = torch.randn(1, 1, H_k, K, generator=draw) + 0.01 * k, torch.ones_like(beta), 1e-5 * g
    if not l2norm:
        k = k / k.norm(dim=-1, keepdim=True)
    q, k = (x.to(dtype) for x in (q, k))
    for x in (q, k, g, beta):
        x[:, sum(lengths) :] = math.nan
    if gap:
        q, k, g, beta = (_gap(x, *gap) for x in (q, k, g, beta))
    bounds = list(itertools.accumulate(lengths, initial=0))
    NC = T // 64 + len(lengths) if packed else -(-T // 64)
    dims = Dims(B, T, H_k, H_v, K, 64, 64, NC, len(lengths) if packed else B, packed)
    tensors = {"q": q, "k": k, "g": g, "beta": beta}
    strides = {name: (x.stride(0), x.stride(1)) for name, x in tensors.items()}
    slots = B * NC
    PX, Y = (torch.full((slots, H_v, 64, n), math.nan, dtype=dtype) for n in (64, K))
    gates = torch.full((slots, H_v, 4, 64), math.nan)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    (q, q_stride), (k, k_stride) = (_prepare.readable(tensors[name], *strides[name]) for name in "qk")
    _prepare.launch(
        (), dims, {"HEADS": heads}, strides, l2norm, scale, q, k, g, beta, cu_seqlens, q_stride, k_stride, PX, Y, gates
    )

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

    assert gates[:, :, 3].isnan().all()
    for slot in range(slots):
        if slot not in chunks:
            assert all(x[slot].isnan().all() for x in (PX, Y, gates))
            continue
        b, begin, length = chunks[slot]
        for h in range(H_v):
            group = h // (H_v // H_k)

            def rows(name: str, head: int, here: tuple[int, int, int] = (b, begin, length)) -> torch.Tensor:
                b, begin, length = here
                x = tensors[name][b, begin : begin + length, head].double()
                return torch.cat([x, x.new_zeros(64 - length, *x.shape[1:])])

            q_, k_ = rows("q", group), rows("k", group)
            fq, fk = ((x.square().sum(-1) + 1e-6).rsqrt() if l2norm else torch.ones_like(x[:, 0]) for x in (q_, k_))
            beta_, G = rows("beta", h), rows("g", h).cumsum(0)
            near(gates[slot, h, 0], scale * fq * G.exp(), 0.05)
            near(gates[slot, h, 1], fk * G.exp(), 0.05)
            near(gates[slot, h, 2], G[-1:].exp(), 0.05)
            lower = torch.ones(64, 64, dtype=torch.bool).tril()
            decay = torch.where(lower, G[:, None] - G[None, :], 0).exp() * fk
            P = torch.where(lower, scale * fq[:, None] * (q_ @ k_.T) * decay, 0)
            A = torch.where(lower.tril(-1), (beta_ * fk)[:, None] * (k_ @ k_.T) * decay, 0)
            X = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A) * beta_
            weighted = (fk * (G[-1] - G).exp())[:, None] * X
            near(PX[slot, h], P.to(dtype).double() @ X.to(dtype).double(), 2)
            near(Y[slot, h], weighted.to(dtype).double().T @ k_, 2)
            # What tokens past the end would bring.
            assert not PX[slot, h, :, length:].any() and not Y[slot, h, length:].any()


@pytest.mark.parametrize("heads", [1, 2])
def test_dense(heads):
    check((100,), B=2, heads=heads, H=(2, 4))
    check((64,), heads=heads, l2norm=False, dtype=torch.float16)


@pytest.mark.parametrize("heads", [1, 2])
def test_packed_between_nan(heads):
    """Sequences of no and of few tokens; what lies behind the last is nobody's."""
    check((0, 70, 1, 0, 64, 30), packed=True, tail=40, heads=heads)
    check((0, 0), packed=True, tail=5, heads=heads)


def test_views_whose_tokens_lie_apart():
    check((70,), B=2, gap=(1, 2))
    check((3, 66), packed=True, gap=(8, 16), K=128)


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


def test_what_is_made_of_it():
    """o and the state, by the second kernel's formulas, against the recurrence."""
    T, K, V = 150, 64, 8
    given = draw((T,), H_k=1, H_v=2, K=K, V=V, dtype="bfloat16", initial=True)
    q, k, v, g, beta = (to_torch(given[name], "cpu") for name in ("q", "k", "v", "g", "beta"))
    PX, Y = (torch.full((3, 2, 64, n), math.nan, dtype=q.dtype) for n in (64, K))
    gates = torch.full((3, 2, 4, 64), math.nan)
    strides = {"g": (0, 2), "beta": (0, 2)}
    dims = Dims(1, T, 1, 2, K, V, 64, 3, 1, False)
    _prepare.launch((), dims, {"HEADS": 2}, strides, True, K**-0.5, q, k, g, beta, None, K, K, PX, Y, gates)
    o = np.zeros((1, T, 2, V))
    state = given["initial_state"].astype(np.float64)
    for c, h in itertools.product(range(3), range(2)):
        rows = slice(64 * c, min(64 * c + 64, T))
        n = rows.stop - rows.start
        of_q, of_k, total = gates[c, h, 0, :n, None], gates[c, h, 1, :n, None], gates[c, h, 2, 0].item()
        S = torch.from_numpy(state[0, h])
        r = v[0, rows, h].double() - of_k * (k[0, rows, 0].double() @ S)
        o[0, rows, h] = of_q * (q[0, rows, 0].double() @ S) + PX[c, h, :n, :n].double() @ r
        state[0, h] = total * S + Y[c, h, :n].double().T @ r
    names = ("q", "k", "v", "g", "beta", "initial_state")
    expected = oracle.chunk_gated_delta_rule(
        *(given[name] for name in names[:5]), initial_state=given["initial_state"], use_qk_l2norm=True
    )
    for got, ref in zip((o, state), expected, strict=True):
        assert error(got, ref).within(4e-3, 1e-2), error(got, ref)


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
