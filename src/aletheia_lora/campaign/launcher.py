"""A cell that several processes train -> what they wrote, and how they ended: torchrun, or accelerate launch.

The launcher starts each process in a session of its own, out of reach of whoever kills the cell's. So all of them read
from a pipe that nothing is ever written to: when the cell is gone, however that came, the pipe ends and so do they. And
they print to a pipe whose end says that the last of them is gone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..run_config import read_yaml

PART = ("-m", "aletheia_lora", "campaign", "part")
"""The command of one process; it is given the cell's folder and the folder to write to."""
NEWS = b"news: "
"""Begins a line that is for the cell's history."""
EXIT_CODE = re.compile(rb"exitcode\s*: (-?\d+) ")
"""How torchrun reports a process that failed."""


def check_launcher(file: Path) -> Path:
    """Check a configuration of ``accelerate launch``; gives the file.

    Raises:
        ConfigError: If it cannot be read, is for several machines, or for another engine than DDP on GPUs: a cell looks
            at whole weights along the run, and on a CPU accelerate starts one process without a word.
    """
    config = read_yaml(file)
    engine = str(config.get("distributed_type"))
    if config.get("use_cpu") or engine in ("NO", "MULTI_CPU"):
        raise ConfigError(
            f"{str(file)!r} is for the CPU (distributed_type: {engine}), where accelerate launch starts one process, "
            "whatever it is told. Leave accelerate_config out: torchrun then starts all of them."
        )
    if engine != "MULTI_GPU":
        raise ConfigError(
            f"{str(file)!r} asks for distributed_type: {engine}. Cells train under DDP (MULTI_GPU): they look at whole "
            "weights along the run. Take `aletheia train` for other engines."
        )
    if config.get("num_machines", 1) != 1:
        raise ConfigError(f"{str(file)!r} asks for {config['num_machines']} machines; a cell's processes share one.")
    return file


def launch_command(content: Mapping[str, Any], arguments: Sequence[str]) -> list[str]:
    """What starts the processes of a cell with this content."""
    count, config = str(content["processes"]), content.get("accelerate_config")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", count]
    if config is not None:
        launcher = ["accelerate.commands.launch", "--config_file", config["file"], "--num_processes", count]
        launcher += ["--main_process_port", "0"]  # one that is free: other cells may be at work
    return [sys.executable, "-m", *launcher, *PART, *arguments]


def launched(command: Sequence[str], news: Callable[[str], None]) -> int:
    """Run the launcher until it and all that it started are gone; gives the exit code of what failed first.

    Lines are printed as they come; those that begin with :data:`NEWS` go to ``news``.
    """
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin is not None and process.stdout is not None
    ending = threading.Thread(target=_end_with, args=(process,), daemon=True)
    ending.start()
    codes: list[int] = []
    try:
        for line in process.stdout:
            codes += map(int, EXIT_CODE.findall(line))
            if line.startswith(NEWS):
                news(line.removeprefix(NEWS).decode(errors="replace").rstrip())
            else:
                print(line.decode(errors="replace"), end="", flush=True)
    finally:
        process.kill()
        ending.join()
        process.stdout.close()
    return codes[-1] if process.returncode and codes else process.returncode


def _end_with(launcher: subprocess.Popen[bytes]) -> None:
    """When the launcher is gone, so is the pipe that its processes live by."""
    launcher.wait()
    assert launcher.stdin is not None
    launcher.stdin.close()
