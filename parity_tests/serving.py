"""A server in miniature: random requests, chunked prefill, decode, speculative decode, and a training step now and then.

`Traffic` draws what a scheduler would hand to the model, `TorchServer` and `serving_jax.JaxServer` make the calls that a layer
makes. What they compute is of no interest here, only what they make the operators compile; other tests look after the values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssm_configs.model_dims import ModelDims


@dataclass(frozen=True)
class Step:
    """One batch: a slot and a token count for each sequence."""

    kind: str
    """"prefill", "decode", "speculative" or "training"."""
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    resumed: tuple[bool, ...] = ()
    """Whether a sequence has a state to go on from."""
    accepted: tuple[int, ...] = ()
    """How many tokens of its last step."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Traffic:
    """Requests with prompts of 1 to `max_prompt` tokens, served `max_tokens` and `max_batch` sequences at a time."""

    def __init__(
        self, seed: int, *, max_prompt: int, max_tokens: int, max_batch: int, max_prefills: int, speculative: int = 0
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self.max_prompt, self.max_tokens, self.max_batch = max_prompt, max_tokens, max_batch
        self.max_prefills, self.speculative = max_prefills, speculative
        self.slots = max_batch + 1
        self._free = list(range(1, self.slots))
        self._waiting: dict[int, int] = {}
        """Prompt tokens that are left, by slot."""
        self._started: set[int] = set()
        self._running: list[int] = []

    def steps(self, count: int) -> Iterator[Step]:
        for _ in range(count):
            self._arrive()
            draw = self._rng.random()
            if draw < 0.1:
                rows = int(self._rng.integers(1, 3))
                yield Step("training", (), (int(self._rng.integers(1, self.max_tokens // rows + 1)),) * rows)
            elif self._waiting and (draw < 0.45 or not self._running):
                yield self._prefill()
            else:
                yield self._decode(speculative=bool(self.speculative) and draw < 0.75)

    def _arrive(self) -> None:
        for _ in range(int(self._rng.integers(0, len(self._free) + 1))):
            # Short prompts as often as long ones, so that every order of size comes up.
            length = int(2 ** self._rng.uniform(0, np.log2(self.max_prompt)))
            self._waiting[self._free.pop()] = length
        if not (self._waiting or self._running):
            self._waiting[self._free.pop()] = self.max_prompt

    def _prefill(self) -> Step:
        """Of the first requests in line, as much as fits: the last one of a batch is often cut."""
        slots, lengths, resumed, room = [], [], [], self.max_tokens
        for slot in list(self._waiting)[: int(self._rng.integers(1, self.max_prefills + 1))]:
            length = min(self._waiting[slot], room)
            if not length:
                break
            slots.append(slot)
            lengths.append(length)
            resumed.append(slot in self._started)
            room -= length
            self._started.add(slot)
            self._waiting[slot] -= length
            if not self._waiting[slot]:
                del self._waiting[slot]
                self._running.append(slot)
        return Step("prefill", tuple(slots), tuple(lengths), tuple(resumed))

    def _decode(self, speculative: bool) -> Step:
        batch = int(self._rng.integers(1, min(self.max_batch, len(self._running)) + 1))
        slots = tuple(self._running[:batch])
        tokens = 1 + self.speculative if speculative else 1
        accepted = tuple(int(count) for count in self._rng.integers(1, tokens + 1, batch))
        for slot in [slot for slot in slots if self._rng.random() < 0.2]:  # the end of a request
            self._running.remove(slot)
            self._started.discard(slot)
            self._free.append(slot)
        return Step("speculative" if speculative else "decode", slots, (tokens,) * batch, (), accepted)


def bounds(lengths: tuple[int, ...], sequences: int = 0) -> np.ndarray:
    """cu_seqlens of these, and of sequences without tokens up to `sequences` in all."""
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    return np.pad(ends, (0, max(0, sequences - len(lengths))), mode="edge")


def padded(values: tuple[Any, ...], count: int, fill: Any, dtype: Any = np.int32) -> np.ndarray:
    return np.array([*values, *[fill] * (count - len(values))], dtype)


class TorchServer:
    """One layer of each kind that the model has, over pools of states."""

    def __init__(
        self, dims: ModelDims, traffic: Traffic, device: str, *, entry: str = "split", sliced: bool = False
    ) -> None:
        import torch

        self.torch, self.dims, self.device, self.entry, self.sliced = torch, dims, device, entry, sliced
        self._generator = torch.Generator(device).manual_seed(1)
        self.speculative, self._padding, self._before = traffic.speculative, np.random.default_rng(2), 0
        self.max_tokens, self.max_batch = traffic.max_tokens, traffic.max_batch
        S, rows = traffic.slots, dims.conv_width - 1 + traffic.speculative
        self.layers = []
        if dims.has_mamba:
            state = self._floats(S, dims.heads, dims.headdim, dims.dstate, dtype=dims.state_dtype)
            self.layers.append(("mamba", dims.mamba_parts, self._floats(S, rows, sum(dims.mamba_parts)), state))
        if dims.has_gdn:
            state = self._floats(S, dims.value_heads, dims.key_dim, dims.value_dim, dtype=dims.state_dtype)
            self.layers.append(("gdn", dims.gdn_parts, self._floats(S, rows, sum(dims.gdn_parts)), state))

    def run(self, step: Step) -> None:
        # Where this step's entries begin among those of a mixed batch.
        self._before = int(self._padding.integers(0, 17))
        for kind, parts, conv_state, state in self.layers:
            D = sum(parts)
            conv = {"weight": self._floats(D, self.dims.conv_width), "activation": "silu"}
            conv["bias"] = self._floats(D) if self.dims.conv_bias else None
            forward = self._mamba if kind == "mamba" else self._gdn
            with self.torch.no_grad():
                forward(step, parts, conv, conv_state, state)

    def _floats(self, *shape: int, dtype: str = "") -> Any:
        values = self.torch.randn(shape, generator=self._generator, device=self.device)
        return values.to(getattr(self.torch, dtype or self.dims.dtype))

    def _ints(self, values: Any) -> Any:
        tensor = self.torch.as_tensor(np.asarray(values), device=self.device)
        if not self.sliced:
            return tensor
        before = self._before
        return self.torch.cat([tensor[:1].expand(before, *tensor.shape[1:]), tensor])[before:]

    def _projection(self, tokens: int, *widths: int) -> Any:
        before = int(self._padding.integers(0, 9)) if self.sliced else 0
        return [part[before:] for part in self._floats(before + tokens, sum(widths)).split(list(widths), dim=1)]

    def _batch(self, step: Step) -> tuple[int, int, dict[str, Any]]:
        """(sequences and tokens, with padding as a captured graph would have it, and the index tensors)."""
        tokens = 1 + self.speculative if step.kind == "speculative" else 1
        N_seq = min(len(step.slots) + int(self._padding.integers(0, 3)) * (step.kind != "prefill"), self.max_batch)
        slots = padded(step.slots, N_seq, -1)
        if step.kind == "decode":
            return N_seq, N_seq, {"slots": slots}
        if step.kind == "prefill":
            T = min(step.tokens + int(self._padding.integers(0, 9)), self.max_tokens)
            return (
                N_seq,
                T,
                {"slots": slots, "cu_seqlens": self.torch.as_tensor(bounds(step.lengths), device=self.device)},
            )
        cu_seqlens = self.torch.as_tensor(bounds(step.lengths, N_seq), device=self.device)
        accepted = self._ints(padded(step.accepted, N_seq, 1))
        columns = np.repeat(slots[:, None], tokens, axis=1)
        return (
            N_seq,
            N_seq * tokens,
            {"slots": slots, "columns": columns, "cu_seqlens": cu_seqlens, "accepted": accepted},
        )

    def _convolved(
        self, step: Step, parts: tuple[int, ...], x: Any, conv: dict[str, Any], conv_state: Any, batch: dict[str, Any]
    ):
        """x, B and C (or q, k and v), [1,T,width] each."""
        from triton_ssm import causal_conv1d, causal_conv1d_split, causal_conv1d_update

        if step.kind in ("decode", "speculative"):
            optional = {} if step.kind == "decode" else {
                "cu_seqlens": batch["cu_seqlens"], "num_accepted_tokens": batch["accepted"],
            }  # fmt: skip
            y = causal_conv1d_update(x, conv_state, **conv, conv_state_indices=self._ints(batch["slots"]), **optional)
            return y[None].split(list(parts), dim=2)
        if step.kind == "training":
            x = x.unflatten(0, (len(step.lengths), step.lengths[0]))
        else:
            x = x[None]
            conv = conv | {
                "conv_state": conv_state, "state_indices": self._ints(batch["slots"]), "cu_seqlens": batch["cu_seqlens"],
                "has_initial_state": self._ints(np.array(step.resumed)),
            }  # fmt: skip
        if self.entry == "plain":
            return causal_conv1d(x, **conv)[0].split(list(parts), dim=2)
        chunk_size = self.dims.chunk_size if self.entry == "aligned" and parts == self.dims.mamba_parts else None
        return causal_conv1d_split(x, conv.pop("weight"), parts, chunk_size=chunk_size, **conv)[0]

    def _mamba(self, step: Step, parts: tuple[int, ...], conv: dict[str, Any], conv_state: Any, state: Any) -> None:
        from triton_ssm import mamba_chunk_scan_combined, selective_state_update

        dims, training = self.dims, step.kind == "training"
        H, P = dims.heads, dims.headdim
        batch: dict[str, Any] = {}
        T = step.tokens
        if not training:
            _, T, batch = self._batch(step)
        z, xBC, dt = self._projection(T, H * P, sum(parts), H)
        x, B, C = self._convolved(step, parts, xBC, conv, conv_state, batch)
        x, B, C = x.unflatten(2, (H, P)), *(part.unflatten(2, (dims.groups, dims.dstate)) for part in (B, C))
        named: dict[str, Any] = {"D": self._floats(H), "dt_bias": self._floats(H), "dt_softplus": True}
        A = -self._floats(H, dtype="float32").abs() - 1
        if step.kind in ("decode", "speculative"):
            named["z"] = z.unflatten(1, (H, P)) if dims.gate else None
            named["state_batch_indices"] = self._ints(batch.get("columns", batch["slots"]))
            if step.kind == "speculative":
                named |= {"cu_seqlens": batch["cu_seqlens"], "num_accepted_tokens": batch["accepted"]}
            selective_state_update(state, x[0], dt, A, B[0], C[0], **named)
            return
        named |= {"chunk_size": dims.chunk_size, "chunk_aligned": self.entry == "aligned"}
        rows = len(step.lengths) if training else 1
        dt = dt.unflatten(0, (rows, -1))
        if dims.gate:
            named["z"] = z.unflatten(1, (H, P)).unflatten(0, (rows, -1))
        if not training:
            slots = batch["slots"]
            named |= {
                "cu_seqlens": batch["cu_seqlens"],
                "final_states_out": state,
                "final_state_indices": self._ints(slots),
            }
            if any(step.resumed):
                fresh = self.torch.as_tensor(np.array([not resumed for resumed in step.resumed]), device=self.device)
                chosen = state[self.torch.as_tensor(slots, device=self.device).long()]
                named["initial_states"] = chosen.masked_fill(fresh.view(-1, 1, 1, 1), 0)
        mamba_chunk_scan_combined(x, dt, A, B, C, **named)

    def _gdn(self, step: Step, parts: tuple[int, ...], conv: dict[str, Any], conv_state: Any, state: Any) -> None:
        from triton_ssm import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

        dims, training = self.dims, step.kind == "training"
        H_k, H_v, K, V = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim
        batch: dict[str, Any] = {}
        T = step.tokens
        if not training:
            _, T, batch = self._batch(step)
        qkv, _ = self._projection(T, sum(parts), H_v * V)
        beta, g = self._projection(T, H_v, H_v)
        q, k, v = self._convolved(step, parts, qkv, conv, conv_state, batch)
        q, k, v = q.unflatten(2, (H_k, K)), k.unflatten(2, (H_k, K)), v.unflatten(2, (H_v, V))
        named: dict[str, Any] = {"use_qk_l2norm": dims.qk_l2norm}
        if step.kind in ("decode", "speculative"):
            named |= {"A_log": self._floats(H_v, dtype="float32"), "dt_bias": self._floats(H_v), "sigmoid_beta": True}
            named["state_indices"] = self._ints(batch.get("columns", batch["slots"]))
            if step.kind == "speculative":
                named |= {"cu_seqlens": batch["cu_seqlens"], "num_accepted_tokens": batch["accepted"]}
            fused_recurrent_gated_delta_rule(q[0], k[0], v[0], g, beta, state, **named)
            return
        rows = len(step.lengths) if training else 1
        g, beta = -g.float().abs(), beta.float().sigmoid()
        g, beta = (tensor.unflatten(0, (rows, -1)).contiguous() for tensor in (g, beta))
        if not training:
            named |= {"cu_seqlens": batch["cu_seqlens"], "return_final_state": True}
            if any(step.resumed):
                named["initial_state"] = state[self.torch.as_tensor(batch["slots"], device=self.device).long()]
        chunk_gated_delta_rule(q, k, v, g, beta, **named)
