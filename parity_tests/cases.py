"""The one registry of shapes: tests, parity report, benchmarks and tuner all draw from it.

A case is dimensions by the field's names, dtypes and options; `inputs.draw` turns it into arrays. Tags:

    ci        small enough for both interpreters on two CPU cores
    standard  a real model's shape, for the GPU report and the benchmark
    odd       shapes and options off the beaten path
    large     needs a GPU's memory: more than 2^31 state elements, more than 65,535 rows
    no-mosaic a shape that the Mosaic GPU kernel declines; `pallas_ssm` serves it through XLA
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .case import Case as Case
from .cases_gdn import GDN_MODELS as GDN_MODELS
from .cases_gdn import GDN_STAGES as GDN_STAGES
from .cases_gdn import GDNDims as GDNDims
from .cases_gdn import gdn_cases


@dataclass(frozen=True)
class Mamba2Dims:
    """A published model's Mamba-2 mixer: heads, groups, headdim, dstate, chunk (transformers configurations)."""

    name: str
    H: int
    G: int
    P: int
    N: int
    chunk_size: int

    def slice(self, ranks: int) -> "Mamba2Dims":
        """One rank of a tensor-parallel split; groups are replicated where there are fewer of them than ranks."""
        name = f"{self.name}/TP{ranks}"
        return replace(self, name=name, H=self.H // ranks, G=max(1, self.G // ranks))


MAMBA2_MODELS = (
    Mamba2Dims("Mamba2-2.7B", 80, 1, 64, 128, 256),
    Mamba2Dims("Nemotron-H-8B", 128, 8, 64, 128, 128),
    Mamba2Dims("Nemotron-H-56B", 256, 8, 64, 256, 128),
    Mamba2Dims("Nemotron-Nano-12B-v2", 128, 8, 80, 128, 128),
    Mamba2Dims("Nemotron-3-Nano-30B", 64, 8, 64, 128, 128),
    Mamba2Dims("Granite-4-small", 128, 1, 64, 128, 256),
    Mamba2Dims("Granite-4-tiny", 48, 1, 64, 128, 256),
    Mamba2Dims("Falcon-H1-1.5B", 48, 1, 64, 256, 256),
    Mamba2Dims("Falcon-H1-34B", 32, 2, 128, 256, 256),
    Mamba2Dims("Zamba2-2.7B", 80, 1, 64, 64, 256),
    Mamba2Dims("Codestral-Mamba-7B", 128, 8, 64, 128, 256),
)


def _decode(model: Mamba2Dims, batch: int, state_dtype: str, tags: set[str], **options) -> Case:
    # Serving keeps more slots than it decodes at once; a few spare ones show that nothing else is written.
    dims = {"S": batch + 3, "B": batch, "H": model.H, "G": model.G, "P": model.P, "N": model.N}
    options = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True} | options
    return Case("selective_state_update", model.name, dims, "bfloat16", state_dtype, options, frozenset(tags))


def _decode_cases() -> Iterator[Case]:
    for model in MAMBA2_MODELS:
        for state_dtype in ("float32", "float16"):
            yield _decode(model, 8, state_dtype, {"standard"})
        # On a CPU one rank of a wide split stands for the model: same P, N and head-to-group ratio, few heads.
        yield _decode(model.slice(model.H // 2), 2, "float32", {"ci"})
    for ranks in (2, 4, 8):
        yield _decode(MAMBA2_MODELS[1].slice(ranks), 64, "float32", {"standard"})
        yield _decode(MAMBA2_MODELS[0].slice(ranks), 64, "bfloat16", {"standard"})


def _odd(
    name: str, dtype: str = "float32", state_dtype: str = "float32", tags=("ci", "odd"), dims=(), **options
) -> Case:
    base = {"S": 12, "B": 4, "H": 4, "G": 2, "P": 16, "N": 32}
    return Case("selective_state_update", name, base | dict(dims), dtype, state_dtype, options, frozenset(tags))


def _odd_cases() -> Iterator[Case]:
    full: dict[str, Any] = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True}
    yield _odd("nothing optional")
    yield _odd("head-less, untied", dims={"H": 1, "G": 1}, headless=True, untied=True, D=True, z=True)
    yield _odd("head-less, tied", dims={"H": 1, "G": 1}, headless=True, D=True, dt_bias=True, dt_softplus=True)
    yield _odd("untied dt and A", untied=True, **full)
    yield _odd("untied dt and A, D [H,P]", "bfloat16", "float16", untied=True, D_per_headdim=True, **full)
    yield _odd("gate z, bf16 state", "bfloat16", "bfloat16", z=True, **full)
    yield _odd("gate z, fp16", "float16", "float16", z=True, **full)
    yield _odd("P=80 N=96", "bfloat16", "bfloat16", dims={"P": 80, "N": 96}, **full)
    yield _odd("P=48 N=16", "bfloat16", "float32", dims={"P": 48, "N": 16}, z=True, **full)
    yield _odd(
        "destination slots, padding and null slot", "bfloat16", "float16", z=True, dst=True, padding=True, **full
    )
    yield _odd("every row padding", "bfloat16", padding="all", **full)
    yield _odd("packed, zero lengths, padded tail", "bfloat16", lengths=(3, 0, 1, 2), tail=3, z=True, **full)
    yield _odd("packed, padding and destination slots", lengths=(2, 3, 0, 1, 4), dst=True, padding=True, **full)
    yield _odd("speculative", "bfloat16", lengths=(3, 1, 0, 2), dims={"S": 20}, spec=4, z=True, **full)
    yield _odd("speculative, 16-bit states, padding", "bfloat16", "float16", lengths=(4, 2, 1), dims={"S": 24}, spec=4,
               dst=True, padding=True, **full)  # fmt: skip
    yield _odd("speculative, one token each", dims={"S": 16}, spec=3, **full)
    yield _odd("stochastic rounding to bf16", "bfloat16", "bfloat16", rounding_seed=1234, **full)
    yield _odd("stochastic rounding to fp16, N=96", "bfloat16", "float16", dims={"P": 32, "N": 96}, rounding_seed=2**40 + 7,
               **full)  # fmt: skip
    yield _odd("headdim 5, dstate 24", "float32", "float32", ("ci", "odd", "no-mosaic"), {"P": 5, "N": 24}, **full)


def _large_cases() -> Iterator[Case]:
    full: dict[str, Any] = {"D": True, "dt_bias": True, "dt_softplus": True, "slots": True}
    wide = {"S": 2100, "B": 8, "H": 128, "G": 8, "P": 64, "N": 128}  # 2100·128·64·128 = 2.2e9 elements
    for state_dtype in ("float32", "bfloat16"):
        yield _odd("more than 2^31 state elements", "bfloat16", state_dtype, ("large",), wide, high_slots=True, **full)
    tall = {"S": 70_000, "B": 70_000, "H": 2, "G": 1, "P": 16, "N": 16}
    yield _odd("more than 65,535 rows", "bfloat16", "float32", ("large",), tall, **full)


# Channels of the convolution: the model's x, B and C (q, k and v for the gated delta rule) side by side.
CONV_CHANNELS = {
    "Nemotron-H-8B/TP8": 1280,
    "Mamba2-2.7B/TP2": 2816,
    "Granite-4-tiny": 3328,
    "Mamba2-2.7B": 5376,
    "Nemotron-3-Nano-30B": 6144,
    "Qwen3-Next": 8192,
    "Granite-4-small": 8448,
    "Nemotron-H-8B": 10240,
    "Qwen3.5-397B": 12288,
    "Nemotron-H-56B": 20480,
}


def _conv(name: str, T: int, D: int, tags: tuple[str, ...], dtype: str = "bfloat16", B: int = 1, W: int = 4, **options):
    options = {"bias": True, "activation": "silu"} | options
    return Case("causal_conv1d", name, {"B": B, "T": T, "D": D, "W": W}, dtype, dtype, options, frozenset(tags))


def _conv_cases() -> Iterator[Case]:
    for name, D in CONV_CHANNELS.items():
        yield _conv(name, 2048, D, ("standard",), lengths=(700, 0, 1, 1347), pool=True)
    yield _conv("Nemotron-H-8B, four sequences", 8192, 10240, ("standard",), lengths=(2048,) * 4, pool=True)
    odd = ("ci", "odd")
    for W in (2, 3, 4, 5, 6):
        yield _conv(f"width {W}, dense", 21, 64, odd, B=2, W=W, initial=True)
        yield _conv(f"width {W}, packed", 24, 64, odd, "float32", W=W, lengths=(9, 0, 1, 12), tail=2, initial=True)
    yield _conv("no bias, no activation, no state", 19, 64, odd, "float16", bias=False, activation=None)
    yield _conv("pool, padding and null slot", 30, 128, odd, lengths=(8, 0, 3, 9, 10), pool=True, padding=True)
    yield _conv("pool with spare rows", 17, 64, odd, "float32", lengths=(1, 16), pool=True, spare_rows=2)
    yield _conv("split", 20, 256, odd, sizes=(128, 64, 64), lengths=(11, 9), initial=True)
    yield _conv(
        "split, chunk-aligned", 40, 256, odd, sizes=(128, 64, 64), chunk_size=16, lengths=(17, 0, 2, 16), tail=5
    )
    yield _conv("split, chunk-aligned, dense", 20, 192, odd, "float32", B=2, sizes=(64, 128), chunk_size=16)
    yield _conv("split, chunk-aligned, pool", 40, 128, odd, sizes=(64, 64), chunk_size=16, lengths=(15, 20, 5), pool=True,
                padding=True)  # fmt: skip
    yield _conv("37 channels", 13, 37, ("ci", "odd", "no-mosaic"), "float32", lengths=(6, 7), initial=True)
    yield _conv("more than 2^31 elements", 250_000, 10240, ("large",), lengths=(249_990, 10), pool=True)
    yield _conv("more than 65,535 sequences", 70_000, 64, ("large",), lengths=(1,) * 70_000, pool=True)


def _conv_update(name: str, B: int, D: int, tags: tuple[str, ...], dtype: str = "bfloat16", W: int = 4, **options):
    dims = {"S": B + 3, "L": W - 1 + options.pop("spare_rows", 0), "B": B, "D": D, "W": W}
    options = {"bias": True, "activation": "silu", "slots": True} | options
    return Case("causal_conv1d_update", name, dims, dtype, dtype, options, frozenset(tags))


def _conv_update_cases() -> Iterator[Case]:
    for name, D in CONV_CHANNELS.items():
        yield _conv_update(name, 64, D, ("standard",))
    for batch in (1, 256, 1024):
        yield _conv_update("Nemotron-H-8B", batch, 10240, ("standard",))
    odd = ("ci", "odd")
    for W in (2, 3, 4, 5, 6):
        yield _conv_update(f"width {W}", 3, 128, odd, W=W)
        yield _conv_update(f"width {W}, speculative", 4, 128, odd, W=W, spare_rows=3, lengths=(4, 1, 0, 2), spec=True)
    yield _conv_update(
        "no slots, no bias, no activation", 4, 128, odd, "float32", slots=False, bias=False, activation=None
    )
    yield _conv_update("padding and null slot", 5, 128, odd, "float16", padding=True)
    yield _conv_update("packed, zero lengths, tail", 4, 128, odd, "float32", lengths=(2, 0, 5, 1), tail=2)
    yield _conv_update("speculative, padding, short pool", 4, 128, odd, spare_rows=1, lengths=(3, 2, 4, 1), spec=True,
                       padding=True)  # fmt: skip
    yield _conv_update("speculative, one token each", 4, 128, odd, spare_rows=2, spec=True)
    yield _conv_update("37 channels", 3, 37, ("ci", "odd", "no-mosaic"), "float32")
    yield _conv_update("more than 65,535 rows", 70_000, 128, ("large",))


def _scan(name: str, T: int, model: Mamba2Dims, tags: tuple[str, ...], dtype: str = "bfloat16",
          state_dtype: str = "float32", B: int = 1, **options):  # fmt: skip
    dims = {"B": B, "T": T, "H": model.H, "G": model.G, "P": model.P, "N": model.N, "L": model.chunk_size}
    return Case("mamba_chunk_scan_combined", name, dims, dtype, state_dtype, {"D": True} | options, frozenset(tags))


def _scan_cases() -> Iterator[Case]:
    for model in MAMBA2_MODELS:
        yield _scan(model.name, 1024, model, ("standard",))
    for ranks in (2, 4, 8):
        yield _scan(f"Nemotron-H-8B/TP{ranks}", 2048, MAMBA2_MODELS[1].slice(ranks), ("standard",))
    nemotron, granite = MAMBA2_MODELS[1], MAMBA2_MODELS[6]
    resumed = {"lengths": (700, 0, 1, 323), "initial": True}
    yield _scan("Nemotron-H-8B, packed", 1024, nemotron, ("standard",), **resumed)
    yield _scan("Nemotron-H-8B, packed, aligned", 1024, nemotron, ("standard",), chunk_aligned=True, **resumed)
    yield _scan("Nemotron-Nano-12B-v2, packed", 1024, MAMBA2_MODELS[3], ("standard",), **resumed)
    yield _scan("Nemotron-H-8B, slow decay", 4096, nemotron.slice(8), ("standard",), slow=True, initial=True)
    yield _scan("Granite-4-tiny, slow decay, packed", 4096, granite, ("standard",), slow=True, lengths=(4000, 96))
    yield _scan("Granite-4-tiny, gate, every chunk's state", 1000, granite, ("odd",), "float16", "float16", z=True,
                lengths=(513, 400), tail=87, return_intermediate_states=True)  # fmt: skip

    small = Mamba2Dims("small", 2, 1, 64, 64, 64)
    tiny = Mamba2Dims("tiny", 4, 2, 16, 16, 16)
    odd = ("ci", "odd")
    others = (*odd, "no-mosaic")
    # What the Mosaic kernel takes has at least 64 channels by 64 states, which the interpreter is slow at: few of these.
    yield _scan("dense", 100, small, odd, B=2)
    yield _scan(
        "packed, everything", 150, small, odd, z=True, initial=True, lengths=(70, 0, 9, 64), tail=7, poison=True
    )
    yield _scan("packed, aligned, slow decay", 160, small, odd, "float16", slow=True, initial=True, lengths=(130, 30),
                chunk_aligned=True)  # fmt: skip
    yield _scan("every chunk's state, 16-bit", 140, small, odd, state_dtype="bfloat16", lengths=(129, 11),
                return_intermediate_states=True, initial=True)  # fmt: skip
    yield _scan("fp32, dense", 50, tiny, others, "float32", B=2, z=True, initial=True)
    yield _scan("fp32, packed, everything", 60, tiny, others, "float32", z=True, initial=True, lengths=(17, 0, 1, 33), tail=9,
                poison=True, dt_limit=(0.005, 0.05), D_per_headdim=True)  # fmt: skip
    yield _scan("fp32, no D, no softplus", 40, tiny, others, "float32", D=False, dt_softplus=False, lengths=(16, 24))
    yield _scan(
        "fp32, every chunk's state", 40, tiny, others, "float32", lengths=(5, 35), return_intermediate_states=True
    )
    yield _scan("fp32, aligned, dense", 40, tiny, others, "float32", B=2, chunk_aligned=True, slow=True)
    yield _scan("P=80 N=96", 40, Mamba2Dims("odd", 2, 2, 80, 96, 32), others, initial=True, lengths=(33, 7))
    yield _scan("P=32 N=16, D [H,P]", 40, Mamba2Dims("odd", 2, 1, 32, 16, 32), others, D_per_headdim=True, z=True)
    yield _scan("P=128 N=256", 33, Mamba2Dims("odd", 1, 1, 128, 256, 32), odd, lengths=(20, 13))
    yield _scan("more than 2^31 elements", 266_000, nemotron, ("large",), lengths=(265_000, 1000), slow=True)


SSD_STAGES = ("ssd.chunk_cumsum", "ssd.chunk_state", "ssd.state_passing", "ssd.bmm_chunk", "ssd.chunk_scan")


def _stage_cases() -> Iterator[Case]:
    nemotron, mamba2 = MAMBA2_MODELS[1], MAMBA2_MODELS[0]
    small, tiny = Mamba2Dims("small", 2, 1, 64, 64, 64), Mamba2Dims("tiny", 4, 2, 16, 16, 16)
    odd = ("ci", "odd")
    scans = (
        _scan("Nemotron-H-8B", 1024, nemotron, ("standard",), lengths=(700, 0, 1, 323), initial=True),
        _scan("Mamba2-2.7B", 700, mamba2, ("standard",), B=2),
        _scan("dense", 100, small, odd, B=2, initial=True),
        _scan("packed", 150, small, odd, "float16", "float16", lengths=(70, 0, 9, 64), tail=7, z=True, initial=True),
        _scan("fp32, dense", 37, tiny, (*odd, "no-mosaic"), "float32", B=2, initial=True),
        _scan("fp32, packed", 60, tiny, (*odd, "no-mosaic"), "float32", lengths=(17, 0, 1, 33), tail=9, z=True,
              D_per_headdim=True, dt_limit=(0.005, 0.05)),
    )  # fmt: skip
    for op in SSD_STAGES:
        for scan in scans:
            # Carrying states along is no product: its kernel takes what the others decline.
            yield replace(scan, op=op, tags=scan.tags - {"no-mosaic"} if op == "ssd.state_passing" else scan.tags)


CASES: tuple[Case, ...] = (
    *_decode_cases(), *_odd_cases(), *_large_cases(), *_conv_cases(), *_conv_update_cases(), *_scan_cases(), *_stage_cases(),
    *gdn_cases(),
)  # fmt: skip


def select(*, op: str | None = None, tags: tuple[str, ...] = ()) -> list[Case]:
    """The cases of `op` (or of all) that carry at least one of `tags` (or any)."""
    return [case for case in CASES if (op is None or case.op == op) and (not tags or case.tags & set(tags))]
