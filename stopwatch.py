"""Measures how long each part of a run's start takes."""

import os
import time
from pathlib import Path


class Stopwatch:
    """The seconds of each part; str() is "5.1 s: import 1.8, data 0.4"."""

    def __init__(self, age=0.0):
        """age: the seconds that the first part has taken already."""
        self.seconds, self.since = {}, time.perf_counter() - age

    def lap(self, part):
        """Add the time since the last lap to this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.since
        self.since = now

    def __str__(self):
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s: {parts}"


def process_age():
    """The seconds since this process started, from Linux's /proc."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
