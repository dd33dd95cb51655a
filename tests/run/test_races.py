"""Many short runs with one scratch, started and ended at random moments: they join, leave, start keepers and purge at
the same time."""

from __future__ import annotations

import random
import subprocess
import time

import pytest

from tests.run.running import SECONDS, JobPlace, warnings_of

ROUNDS, RUNS = 20, 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_short_runs_at_random_moments(place: JobPlace):
    chance = random.Random(4)
    script = 'cat "$1"/one "$1"/sub/two; sleep "$2"; cat "$1"/sub/two; exit 5'
    for number in range(ROUNDS):
        started = []
        for _ in range(RUNS):
            time.sleep(chance.random() * 0.25)  # not waiting for anything: this is the race
            pause = f"{chance.random() * 0.3:.3f}"
            command = ("sh", "-c", script, "sh", place.source, pause)
            started.append(place.launch(command=command, stdout=subprocess.PIPE))
        for process, errors in started:
            said, _ = process.communicate(timeout=SECONDS)
            errors.seek(0)
            told = errors.read().decode()
            assert (process.returncode, warnings_of(told)) == (5, []), f"round {number}: {told}"
            assert said == b"1" * 1000 + b"2" * 4000
        place.wait_for_the_end()
        assert not place.scratch.exists(), f"round {number}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_that_are_killed_at_random_moments(own_place: JobPlace):
    """Whatever moment it is: the others are served, and in the end nothing is left."""
    place, chance = own_place, random.Random(5)
    script = 'cat "$1"/one "$1"/sub/two; sleep 0.2'
    for number in range(ROUNDS):
        started = [
            place.launch(command=("sh", "-c", script, "sh", place.source), stdout=subprocess.PIPE) for _ in range(4)
        ]
        time.sleep(chance.random() * 0.8)
        victims = chance.sample(started, 2)
        for process, _ in victims:
            process.kill()
        for process, errors in started:
            said, _ = process.communicate(timeout=SECONDS)
            if (process, errors) in victims:
                assert process.returncode in (0, -9)
                continue
            errors.seek(0)
            told = errors.read().decode()
            assert process.returncode == 0, f"round {number}: {told}"
            assert said == b"1" * 1000 + b"2" * 2000
            assert warnings_of(told) == [], f"round {number}"
        place.wait_for_the_end()
        assert not place.scratch.exists(), f"round {number}"
