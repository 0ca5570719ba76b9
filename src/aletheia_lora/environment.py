"""This process -> the versions and the hardware that a record names, without names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def environment() -> dict[str, str]:
    """Versions and hardware, without names of hosts, users or folders."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    packages = ("torch", "transformers", "peft", "trl", "accelerate")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "threads": str(torch.get_num_threads()),
        "device": device,
    }
