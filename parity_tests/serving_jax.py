"""The server of `serving` in JAX."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ssm_configs.model_dims import ModelDims

from .serving import Step, Traffic, bounds, padded

# As docs/warmup.md has users pad.
SMALLEST_PREFILL = 64


class JaxServer:
    """A model's own jitted steps, padded to buckets; the pools are donated from step to step."""

    def __init__(self, dims: ModelDims, traffic: Traffic, *, implementation: str | None = None) -> None:
        import jax

        self.jax, self.dims, self.traffic, self.implementation = jax, dims, traffic, implementation
        self._rng = np.random.default_rng(1)
        S, rows = traffic.slots, dims.conv_width - 1 + traffic.speculative
        D, H, P, N = sum(dims.mamba_parts), dims.heads, dims.headdim, dims.dstate
        self.width = H * P + D + H
        self.parameters = jax.device_put(
            {
                "weight": self._floats(D, dims.conv_width), "bias": self._floats(D), "D": self._floats(H),
                "dt_bias": self._floats(H), "A": -np.abs(self._floats(H, dtype="float32")) - 1,
            }
        )  # fmt: skip
        self.pools = jax.device_put((self._floats(S, rows, D), self._floats(S, H, P, N, dtype=dims.state_dtype)))
        self.steps = {
            "prefill": jax.jit(self._prefill, donate_argnums=1),
            "decode": jax.jit(self._decode, donate_argnums=1),
            "speculative": jax.jit(self._decode, donate_argnums=1),
            "training": jax.jit(self._training),
        }

    def _floats(self, *shape: int, dtype: str = "") -> np.ndarray:
        import ml_dtypes

        name = dtype or self.dims.dtype
        return self._rng.standard_normal(shape).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

    def run(self, step: Step) -> None:
        arguments = self._arguments(step)
        if step.kind == "training":
            self.jax.block_until_ready(self.steps["training"](self.parameters, *arguments))
        else:
            y, self.pools = self.steps[step.kind](self.parameters, self.pools, *arguments)
            self.jax.block_until_ready(y)

    def _arguments(self, step: Step) -> tuple[Any, ...]:
        """Padded to buckets. NumPy's, for whatever JAX did to them outside of a step would be compiled as well."""
        from pallas_ssm import bucket

        if step.kind == "training":
            return (self._floats(1, bucket(max(step.lengths), SMALLEST_PREFILL), self.width),)
        if step.kind == "prefill":
            N_seq, T = self.traffic.max_prefills, bucket(step.tokens, SMALLEST_PREFILL)
            resumed = padded(step.resumed, N_seq, False, bool)
            return self._floats(T, self.width), bounds(step.lengths, N_seq), padded(step.slots, N_seq, -1), resumed
        N_seq = bucket(len(step.slots))
        slots = padded(step.slots, N_seq, -1)
        if step.kind == "decode":
            return self._floats(N_seq, self.width), slots
        tokens = 1 + self.traffic.speculative
        columns = np.repeat(slots[:, None], tokens, axis=1)
        accepted = padded(step.accepted, N_seq, 1)
        return self._floats(N_seq * tokens, self.width), slots, columns, bounds(step.lengths, N_seq), accepted

    def programs(self) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """Every step with the shapes that traffic can give it."""
        from pallas_ssm import buckets

        def shapes(tree: Any) -> Any:
            return self.jax.tree.map(lambda leaf: self.jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

        traffic, fixed = self.traffic, shapes(self.parameters)
        kinds = [("prefill", traffic.max_tokens), ("decode", traffic.max_batch), ("training", traffic.max_tokens)]
        if traffic.speculative:
            kinds.append(("speculative", traffic.max_batch))
        for kind, most in kinds:
            for size in buckets(most, SMALLEST_PREFILL) if kind in ("prefill", "training") else buckets(most):
                sequences = (1,) * min(size, most) if kind == "decode" else (1 + traffic.speculative,) * min(size, most)
                lengths = sequences if kind in ("decode", "speculative") else (min(size, most),)
                step = Step(kind, (0,) * len(lengths), lengths, (False,) * len(lengths), (1,) * len(lengths))
                arguments = shapes(self._arguments(step))
                yield (
                    self.steps[kind],
                    (fixed, *arguments) if kind == "training" else (fixed, shapes(self.pools), *arguments),
                )

    def _split(self, projection: Any) -> tuple[Any, Any]:
        """(channels to convolve, dt)."""
        HP, H = self.dims.heads * self.dims.headdim, self.dims.heads
        return projection[..., HP:-H], projection[..., -H:]

    def _heads(self, y: Any) -> tuple[Any, ...]:
        dims = self.dims
        x, B, C = self.jax.numpy.split(y, np.cumsum(dims.mamba_parts)[:-1], axis=-1)
        groups = (*y.shape[:-1], dims.groups, dims.dstate)
        return x.reshape(*y.shape[:-1], dims.heads, dims.headdim), B.reshape(groups), C.reshape(groups)

    def _named(self, parameters: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """What the convolution, the scan and its update take of them, and A."""
        mine = {"implementation": self.implementation}
        conv = {"weight": parameters["weight"], "bias": parameters["bias"], "activation": "silu"} | mine
        return (
            conv,
            {name: parameters[name] for name in ("D", "dt_bias")} | {"dt_softplus": True} | mine,
            parameters["A"],
        )

    def _training(self, parameters: Any, projection: Any) -> Any:
        import pallas_ssm

        conv, named, A = self._named(parameters)
        xBC, dt = self._split(projection)
        y, _ = pallas_ssm.causal_conv1d(xBC, **conv)
        x, B, C = self._heads(y)
        return pallas_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=self.dims.chunk_size, **named)[0]

    def _prefill(self, parameters: Any, pools: Any, projection: Any, cu_seqlens: Any, slots: Any, resumed: Any) -> Any:
        import pallas_ssm

        jnp = self.jax.numpy
        conv, named, A = self._named(parameters)
        conv_state, state = pools
        xBC, dt = self._split(projection[None])
        y, conv_state = pallas_ssm.causal_conv1d(
            xBC, **conv, cu_seqlens=cu_seqlens, conv_state=conv_state, state_indices=slots, has_initial_state=resumed
        )
        x, B, C = self._heads(y)
        initial = jnp.where(resumed[:, None, None, None], state[jnp.maximum(slots, 0)], 0)
        results: Any = pallas_ssm.mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size=self.dims.chunk_size, cu_seqlens=cu_seqlens, initial_states=initial,
            return_final_states=True, state_dtype=state.dtype, **named,
        )  # fmt: skip
        y, final = results
        return y, (conv_state, state.at[jnp.where(slots < 0, state.shape[0], slots)].set(final, mode="drop"))

    def _decode(self, parameters: Any, pools: Any, projection: Any, slots: Any, *speculative: Any) -> Any:
        import pallas_ssm

        conv, named, A = self._named(parameters)
        conv_state, state = pools
        xBC, dt = self._split(projection)
        packing: dict[str, Any] = {}
        columns = slots
        if speculative:
            columns, cu_seqlens, accepted = speculative
            packing = {"cu_seqlens": cu_seqlens, "num_accepted_tokens": accepted}
        update = partial(pallas_ssm.causal_conv1d_update, conv_state_indices=slots, **packing)
        y, conv_state = update(xBC, conv_state, **conv)
        x, B, C = self._heads(y)
        y, state = pallas_ssm.selective_state_update(
            state, x, dt, A, B, C, state_batch_indices=columns, **packing, **named
        )  # fmt: skip
        return y, (conv_state, state)
