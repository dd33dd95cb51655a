"""How hypothesis runs here: the same examples each time, bounded in number, nothing written next to the code."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

FIXED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FEW = settings(FIXED, max_examples=40)
