"""A straight line through points, and how well it goes through them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """`r_squared` is the share of the variance that the line explains, 1 if all points lie on it."""

    slope: float
    intercept: float
    r_squared: float

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    def __str__(self) -> str:
        sign = "+" if self.slope >= 0 else "-"
        return f"{self.intercept:.2f} {sign} {abs(self.slope):.2f} x, R² = {self.r_squared:.4f}"


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """By least squares. ValueError (StatisticsError) for fewer than two points, or all at the same x."""
    slope, intercept = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    spread = sum((y - mean) ** 2 for y in ys)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Line(slope, intercept, 1 - rest / spread if spread else 1.0)
