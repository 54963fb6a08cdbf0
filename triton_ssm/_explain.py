"""Which launch parameters a call would get, and why."""

import torch

import ssm_configs

from ._device import tuning_device


def explain(
    op: str, *, dtype: str, size: int, device: torch.device | str = "cuda", **static: int
) -> ssm_configs.Explanation:
    """Every rule of the look-up in order, and the one that decides; `str()` of the result is meant for people.

    Args:
        op: the operator's name, "selective_state_update".
        dtype: what its tables are filed under, for this operator the state's dtype.
        size: what their rows count, for this operator sequences × heads.
        device: where the call would run.
        **static: the table's other dimensions, for this operator headdim and dstate.
    """
    return ssm_configs.explain(
        op, twin="triton", device=tuning_device(torch.device(device)), dtype=dtype, size=size, **static
    )
