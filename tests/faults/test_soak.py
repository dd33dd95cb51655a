"""The soak for two minutes; for longer: python -m tests.faults.soak."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.harness import clean_environment


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_minutes(tmp_path):
    command = [sys.executable, "-m", "tests.faults.soak", "--minutes", "2", "--folder", str(tmp_path)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong or left: 0" in done.stdout
    faults = ast.literal_eval(re.search(r"^faults: (.*)$", done.stdout, re.MULTILINE)[1])
    assert sum(faults.values()) > 50
    assert {"kill_a_daemon", "calm_down", "purge_and_begin_again", "damage_a_copy"} <= faults.keys()
    if os.geteuid() == 0:
        assert int(re.search(r"^promoted directories: (\d+)$", done.stdout, re.MULTILINE)[1]) > 0
    assert list(tmp_path.iterdir()) == []
