"""The health page of an engine's process, and when the server kills the engine."""

import subprocess
import sys

import pytest

from server.engine.watchdog import Pulse, Vitals, complaint

IN_ANOTHER_PROCESS = """
from server.engine.watchdog import Pulse
pulse = Pulse.find()
pulse.beat(100.0)
pulse.step(90.0, 100.0, 64)
pulse.step(100.0, 104.5, 256)
pulse.step(104.5, 105.0, 16)
"""


def test_another_process_writes_what_this_one_reads() -> None:
    pulse = Pulse.create()
    try:
        assert pulse.read() == Vitals(0.0, 0, 0.0, 0.0, 0, 0.0)
        subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], timeout=30, check=True)
        assert pulse.read() == Vitals(
            beat_time=100.0, steps=3, step_time=105.0, step_seconds=0.5, step_tokens=16, slowest_seconds=4.5
        )
    finally:
        pulse.close()


def vitals(beat: float = 1000.0, step: float = 1000.0, slowest: float = 0.5) -> Vitals:
    return Vitals(beat, 7, step, 0.1, 16, slowest)


STOPPED = "the engine's process has not run for 10 s"
STUCK = "the engine has not finished a step for 30 s (the slowest so far: 0.5 s)"
SLOWER = "the engine has not finished a step for 80 s (the slowest so far: 8.0 s)"


@pytest.mark.parametrize(
    ("seen", "working_since", "hang_seconds", "reason"),
    [
        # The time is 1040 in all of them.
        (vitals(beat=1039.5, step=1039.0), 1000.0, None, None),
        (vitals(beat=1029.0, step=1039.0), 1000.0, None, STOPPED),
        (vitals(beat=1029.0), None, None, STOPPED),
        (vitals(beat=1031.0), None, None, None),
        # Its last step was long ago: that is only a hang if the server waits for one.
        (vitals(beat=1040.0, step=900.0), None, None, None),
        (vitals(beat=1040.0, step=900.0), 1020.0, None, None),
        (vitals(beat=1040.0, step=900.0), 1009.0, None, STUCK),
        (vitals(beat=1040.0, step=1009.0), 900.0, None, STUCK),
        (vitals(beat=1040.0, step=1011.0), 900.0, None, None),
        # A slow machine gets ten times its slowest step.
        (vitals(beat=1040.0, step=961.0, slowest=8.0), 900.0, None, None),
        (vitals(beat=1040.0, step=959.0, slowest=8.0), 900.0, None, SLOWER),
        # An operator's limit replaces both.
        (vitals(beat=1034.0, step=1040.0), None, 5.0, "the engine's process has not run for 5 s"),
        (
            vitals(beat=1040.0, step=1034.0, slowest=8.0),
            900.0,
            5.0,
            "the engine has not finished a step for 5 s (the slowest so far: 8.0 s)",
        ),
        (vitals(beat=1025.0, step=1000.0), 900.0, 60.0, None),
    ],
)
def test_an_engine_that_is_stopped_or_stuck_in_a_step_is_reported(
    seen: Vitals, working_since: float | None, hang_seconds: float | None, reason: str | None
) -> None:
    assert complaint(seen, 1040.0, working_since, hang_seconds) == reason
