"""Student's t and Welch's test, without scipy."""

import math
import statistics

import numpy as np


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, by the midpoint rule on x = t + u / (1 - u)."""
    u = (np.arange(20_000) + 0.5) / 20_000
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = lambda x: np.exp(log_c - (df + 1) / 2 * np.log1p(x * x / df))
    upper = float((density(abs(t) + u / (1 - u)) / (1 - u) ** 2).mean())
    return upper if t >= 0 else 1 - upper


def t_quantile(tail_share: float, df: float) -> float:
    """The t above which ``tail_share`` lies."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > tail_share else (low, middle)
    return low


def welch(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(t, degrees of freedom, one-sided p) that the mean of ``a`` is below that of ``b``; a single value of ``b`` is
    taken as exact."""
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b) if len(b) > 1 else 0.0
    if va + vb == 0:
        return math.inf, math.inf, 0.0 if statistics.fmean(a) < statistics.fmean(b) else 1.0
    t = (statistics.fmean(b) - statistics.fmean(a)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + (vb**2 / (len(b) - 1) if len(b) > 1 else 0.0))
    return t, df, t_tail(t, df)
