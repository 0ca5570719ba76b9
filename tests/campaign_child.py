"""A cell's process that does what the cell's seed says: every way in which an attempt can end."""

import os
import signal
import sys
import time
from pathlib import Path

from aletheia_lora.campaign.executors import EXIT_MACHINE, EXIT_MEMORY, end_with_parent
from aletheia_lora.campaign.records import CellFolder, faults

DONE, KILLED_ONCE, DISK_FULL, MEMORY, MEMORY_ONCE, SEGFAULT, RAISES, NO_RECORD, ENDLESS = range(9)


def main():
    end_with_parent()
    folder = CellFolder.open(Path(sys.argv[1]))
    seed = folder.cell.content["seed"]
    with folder.lock():
        if folder.record() is not None:
            return 0
        folder.append("attempt_started", pid=os.getpid())
        machine, memory = (faults(folder.events(), cause) for cause in ("machine", "memory"))
        if seed == KILLED_ONCE and machine == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if seed == DISK_FULL:
            print("no space left on the device")
            return EXIT_MACHINE
        if seed == MEMORY or (seed == MEMORY_ONCE and memory == 0):
            return EXIT_MEMORY
        if seed == SEGFAULT:
            os.kill(os.getpid(), signal.SIGSEGV)
        if seed == RAISES:
            folder.finish("failed", "ValueError: always")
            return 0
        if seed == NO_RECORD:
            print("cannot import something")
            return 1
        while seed == ENDLESS:
            time.sleep(0.01)
        folder.finish("done", seconds=0.5, heldout_loss=2.0 + seed, learning_rate=1e-3, grid=[], layers=[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
