"""A job whose clock is off by what a file says, in seconds, at any moment: `python jumping.py JOB ARGUMENTS...`

What Python calls the time and the date, in the driver alone; a monotonic clock does not jump, as it never does.
"""

import os
import runpy
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import time_machine

SHIFT = "MASKMILL_TEST_CLOCK_SHIFT"  # names the file
LOOK_S = 0.05


def main() -> None:
    """Entry point."""
    job, *arguments = sys.argv[1:]
    file = Path(os.environ[SHIFT])
    text = file.read_text()
    with time_machine.travel(datetime.now(UTC) + timedelta(seconds=float(text)), tick=True) as traveller:

        def follow(last: str) -> None:
            while True:
                now = file.read_text()
                if now and now != last:
                    real = time_machine.escape_hatch.datetime.datetime.now(tz=UTC)
                    traveller.move_to(real + timedelta(seconds=float(now)))
                    last = now
                time.sleep(LOOK_S)

        threading.Thread(target=follow, args=(text,), daemon=True).start()
        sys.argv = [f"jobs.{job}", *arguments]
        runpy.run_module(f"jobs.{job}", run_name="__main__")


if __name__ == "__main__":
    main()
