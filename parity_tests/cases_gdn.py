"""The gated delta rule's part of the registry: over sequences, each of its stages, and decode."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .case import Case

CHUNKED, RECURRENT = "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
GDN_STAGES = (
    "gdn.chunk_local_cumsum", "gdn.chunk_scaled_dot_kkt", "gdn.solve_tril", "gdn.recompute_w_u", "gdn.chunk_delta_h",
    "gdn.chunk_o",
)  # fmt: skip
# The stages that can do without a gate.
UNGATED = tuple(op for op in GDN_STAGES if op not in ("gdn.chunk_local_cumsum", "gdn.solve_tril"))
# What has a Mosaic GPU kernel, of 16-bit inputs, chunks of 64, and K and V in multiples of 64; and the largest K of each.
MOSAIC = {"gdn.chunk_o": 256, CHUNKED: 128}


@dataclass(frozen=True)
class GDNDims:
    """A published model's gated delta net: key and value heads, and their dims (transformers configurations)."""

    name: str
    H_k: int
    H_v: int
    K: int = 128
    V: int = 128

    def slice(self, ranks: int) -> "GDNDims":
        """One rank of a tensor-parallel split."""
        return replace(self, name=f"{self.name}/TP{ranks}", H_k=self.H_k // ranks, H_v=self.H_v // ranks)


GDN_MODELS = (
    GDNDims("Qwen3-Next", 16, 32),
    GDNDims("Qwen3.5-397B", 16, 64),
    GDNDims("Qwen3.5-27B", 16, 48),
    GDNDims("Qwen3.5-2B", 16, 16),
)
QWEN3_NEXT, QWEN_397B = GDN_MODELS[:2]


def gdn_cases() -> Iterator[Case]:
    yield from _model_cases()
    yield from _odd_cases()
    yield from _stage_cases()
    yield from _decode_cases()
    yield from _odd_decode_cases()
    yield from _large_cases()


def _chunked(name: str, T: int, model: GDNDims, tags: tuple[str, ...], dtype: str = "bfloat16",
             state_dtype: str = "float32", B: int = 1, L: int = 64, op: str = CHUNKED, **options: Any) -> Case:  # fmt: skip
    """`state_dtype`: the initial state's; the last state is fp32."""
    dims = {"B": B, "T": T, "H_k": model.H_k, "H_v": model.H_v, "K": model.K, "V": model.V, "L": L}
    return _tagged(Case(op, name, dims, dtype, state_dtype, options, frozenset(tags)))


def _tagged(case: Case) -> Case:
    served = (
        case.op in MOSAIC
        and case.dtype != "float32"
        and case.dims["L"] == 64
        and case.dims["K"] % 64 == case.dims["V"] % 64 == 0
        and case.dims["K"] <= MOSAIC[case.op]
    )
    return replace(case, tags=case.tags - {"no-mosaic"} if served else case.tags | {"no-mosaic"})


def _model_cases() -> Iterator[Case]:
    standard = ("standard",)
    for model in (*GDN_MODELS, *(QWEN3_NEXT.slice(ranks) for ranks in (2, 4, 8)), QWEN_397B.slice(8)):
        yield _chunked(model.name, 1024, model, standard, l2norm=True)
    resumed: dict[str, Any] = {"lengths": (700, 0, 1, 323), "initial": True, "l2norm": True}
    yield _chunked("Qwen3-Next, packed", 1024, QWEN3_NEXT, standard, **resumed)
    yield _chunked("Qwen3-Next, packed, fp16", 1024, QWEN3_NEXT, standard, "float16", **resumed)
    yield _chunked("Qwen3-Next/TP4, fp32", 600, QWEN3_NEXT.slice(4), standard, "float32", initial=True)
    yield _chunked("Qwen3-Next/TP4, slow gates", 4096, QWEN3_NEXT.slice(4), standard, slow=True, initial=True)
    yield _chunked(
        "Qwen3.5-397B/TP8, slow gates, packed", 4096, QWEN_397B.slice(8), standard, slow=True, lengths=(4000, 96)
    )


def _odd_cases() -> Iterator[Case]:
    odd = ("ci", "odd")
    small, tiny = GDNDims("small", 1, 2, 64, 64), GDNDims("tiny", 2, 4, 16, 32)
    lengths = (66, 0, 9, 6)
    yield _chunked("dense", 70, small, odd, B=2)
    yield _chunked(
        "packed, everything", 84, small, odd, initial=True, lengths=lengths, tail=3, poison=True, l2norm=True
    )
    yield _chunked("packed, fp16 states, gates and beta", 84, small, odd, "float16", "float16", initial=True,
                   lengths=lengths, tail=3, narrow_gates=True)  # fmt: skip
    yield _chunked("fp32, packed, everything", 72, tiny, odd, "float32", initial=True, lengths=(2, 0, 1, 65), tail=4,
                   poison=True, l2norm=True, scale=0.5)  # fmt: skip
    yield _chunked(
        "chunks of 32, fp16, gates of either sign", 40, tiny, odd, "float16", L=32, lengths=(33, 7), rising=True
    )
    yield _chunked(
        "chunks of 16, fp32, gates of either sign", 40, tiny, odd, "float32", B=2, L=16, initial=True, rising=True
    )
    yield _chunked("chunks of 16, four value heads a key", 35, GDNDims("odd", 1, 4, 32, 32), odd, L=16, lengths=(5, 30))
    yield _chunked("K=60 V=100", 70, GDNDims("odd", 1, 2, 60, 100), odd, initial=True, lengths=(66, 4), slow=True)
    for dtype in ("float32", "bfloat16", "float16"):
        # What the inverse must survive: tokens that resemble each other, written at full strength, hardly forgotten.
        yield _chunked("keys that resemble each other", 130, GDNDims("odd", 1, 1, 64, 32), odd, dtype, resembling=True)
    yield _chunked("nothing but padding", 20, tiny, odd, L=16, lengths=(0, 0), tail=20, initial=True, poison=True)


def _stage_cases() -> Iterator[Case]:
    odd, standard = ("ci", "odd"), ("standard",)
    small, tiny = GDNDims("small", 1, 2, 64, 64), GDNDims("tiny", 1, 2, 20, 24)
    packed: dict[str, Any] = {"lengths": (66, 0, 9), "tail": 3}
    for op in GDN_STAGES:
        yield _chunked("Qwen3-Next", 1024, QWEN3_NEXT, standard, op=op, lengths=(700, 0, 1, 323), initial=True)
        yield _chunked("Qwen3.5-397B/TP8", 700, QWEN_397B.slice(8), standard, op=op, B=2)
        yield _chunked("dense", 70, small, odd, op=op, B=2, initial=True)
        yield _chunked("packed", 78, small, odd, "float16", "float16", op=op, initial=True, poison=True, **packed)
        yield _chunked("fp32, packed, gates of either sign", 45, tiny, odd, "float32", L=16, op=op, rising=True,
                       lengths=(17, 0, 1, 20), tail=7)  # fmt: skip
    for op in UNGATED:
        yield _chunked("no gate, chunks of 32", 40, tiny, odd, op=op, L=32, gated=False)
    yield _chunked("keys that resemble each other", 130, small, odd, "float32", op="gdn.solve_tril", resembling=True)
    powers: dict[str, Any] = {"gate_base": "2", "state_layout": "VK"}
    yield _chunked("gates in powers of two, states [V,K]", 70, GDNDims("odd", 1, 3, 128, 64), odd, op="gdn.chunk_o",
                   lengths=(6, 64), **powers)  # fmt: skip
    yield _chunked("fp32, gates in powers of two, states [V,K]", 40, tiny, odd, "float32", L=16, op="gdn.chunk_o", scale=0.3,
                   **powers)  # fmt: skip


def _decode(name: str, B: int, model: GDNDims, tags: tuple[str, ...], dtype: str = "bfloat16",
            state_dtype: str = "float32", spare: int = 3, **options: Any) -> Case:  # fmt: skip
    # Serving keeps more slots than it decodes at once; a few spare ones show that nothing else is written.
    dims = {"S": B + spare, "B": B, "H_k": model.H_k, "H_v": model.H_v, "K": model.K, "V": model.V}
    declined = () if model.K % 16 == 0 and model.V % 16 == 0 else ("no-mosaic",)
    return Case(RECURRENT, name, dims, dtype, state_dtype, options, frozenset((*tags, *declined)))


def _decode_cases() -> Iterator[Case]:
    served: dict[str, Any] = {"slots": True, "gates": True, "l2norm": True}
    for model in (*GDN_MODELS, *(QWEN3_NEXT.slice(ranks) for ranks in (2, 4, 8)), QWEN_397B.slice(8)):
        yield _decode(model.name, 64, model, ("standard",), **served)
    for state_dtype in ("bfloat16", "float16"):
        yield _decode("Qwen3-Next", 32, QWEN3_NEXT, ("standard",), state_dtype=state_dtype, **served)
    # What is drawn for benchmarks has no drafts.
    yield _decode("Qwen3-Next/TP4, speculative", 16, QWEN3_NEXT.slice(4), ("odd",), spare=60, lengths=(4, 3, 2, 1) * 4,
                  spec=4, **served)  # fmt: skip


def _odd_decode_cases() -> Iterator[Case]:
    odd, tiny = ("ci", "odd"), GDNDims("tiny", 1, 2, 32, 16)
    served: dict[str, Any] = {"slots": True, "gates": True, "l2norm": True}
    yield _decode("nothing optional", 3, tiny, odd, "float32")
    yield _decode("as a model calls it", 3, GDNDims("small", 1, 4, 64, 64), odd, **served)
    yield _decode("K=60 V=100, bf16 state", 3, GDNDims("odd", 1, 2, 60, 100), odd, state_dtype="bfloat16", **served)
    yield _decode("gates without a bias, fp16", 3, tiny, odd, "float16", slots=True, gates=True, dt_bias=False)
    yield _decode("destination slots, padding and null slot", 5, tiny, odd, "float16", "float16", spare=7, slots=True,
                  dst=True, padding=True)  # fmt: skip
    yield _decode("every row padding", 3, tiny, odd, slots=True, padding="all")
    yield _decode("packed, zero lengths, padded tail", 4, tiny, odd, slots=True, lengths=(3, 0, 1, 12), tail=3)
    yield _decode("packed, padding and destination slots", 5, tiny, odd, "float32", spare=8, slots=True, dst=True,
                  padding=True, lengths=(2, 3, 0, 1, 4), scale=0.5)  # fmt: skip
    yield _decode(
        "packed, keys that resemble each other", 1, tiny, odd, "float32", slots=True, lengths=(40,), resembling=True
    )
    yield _decode("gates of either sign", 2, tiny, odd, rising=True, lengths=(4, 6))
    yield _decode("speculative", 4, tiny, odd, spare=16, lengths=(3, 1, 0, 2), spec=4, **served)
    yield _decode("speculative, 16-bit states, padding", 3, tiny, odd, "bfloat16", "float16", spare=21, lengths=(4, 2, 1),
                  spec=4, dst=True, padding=True)  # fmt: skip
    yield _decode("speculative, one token each", 4, tiny, odd, "float32", spare=10, spec=3)


def _large_cases() -> Iterator[Case]:
    large, tiny = ("large",), GDNDims("tiny", 1, 1, 16, 16)
    # Chunks of 16: 4125 states of 32 heads before them are 2.2e9 elements.
    yield _chunked(
        "more than 2^31 elements of states", 66_000, QWEN3_NEXT, large, L=16, lengths=(65_000, 1000), slow=True
    )
    yield _chunked("more than 65,535 sequences", 70_000, tiny, large, L=16, lengths=(1,) * 70_000)
    yield _decode("more than 2^31 state elements", 8, QWEN3_NEXT, large, spare=4200, slots=True, high_slots=True)
    yield _decode("more than 65,535 rows", 70_000, tiny, large, slots=True)
