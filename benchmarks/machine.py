"""What everything is measured on, and with which clock."""

from dataclasses import dataclass

import torch

from ssm_configs import Device

from .timing import CLOCKS, Clock


@dataclass(frozen=True)
class Machine:
    device: torch.device
    target: Device
    """The device in the words of the tuning tables."""
    clock: Clock


def this_machine(clock: str) -> Machine:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: torch finds no CUDA device; times are measured on a GPU only")
    device = torch.device("cuda", torch.cuda.current_device())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Machine(device, Device(name, capability), CLOCKS[clock](device))
