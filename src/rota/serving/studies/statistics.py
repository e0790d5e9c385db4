"""The few laws of chance that the studies rest on. Each is exact, or says of what it is an approximation."""

import math
from collections.abc import Callable, Sequence


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-14: DLMF 8.17.22, evaluated as Lentz did."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):  # where the fraction converges slowly, its mirror image does not
        return 1.0 - beta_cdf(1.0 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 10_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * fraction / a


def t_two_sided(t: float, degrees: float) -> float:
    """The chance that Student's t with so many degrees of freedom is at least `|t|` away from 0."""
    return 1.0 if t == 0 else beta_cdf(degrees / (degrees + t * t), degrees / 2.0, 0.5)


def t_quantile(confidence: float, degrees: float) -> float:
    """How far Student's t stays from 0 with this confidence, such as 2.262 for 0.95 and 9 degrees of freedom."""
    high = 1.0
    while t_two_sided(high, degrees) > 1.0 - confidence:
        high *= 2.0
    return _root(lambda t: t_two_sided(t, degrees) - (1.0 - confidence), 0.0, high)


def share_interval(num_hits: int, num_tries: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for a share: it covers the truth at least as often as `confidence` says, however
    few the tries."""
    tail = (1.0 - confidence) / 2.0
    low = high = 0.0
    if num_hits > 0:
        low = _root(lambda p: tail - beta_cdf(p, num_hits, num_tries - num_hits + 1), 0.0, 1.0)
    if num_hits < num_tries:
        high = _root(lambda p: (1.0 - tail) - beta_cdf(p, num_hits + 1, num_tries - num_hits), 0.0, 1.0)
    return low, 1.0 if num_hits >= num_tries else high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: calling all those at most `level` different makes one false call or more with a chance of at
    most `level`, however the questions hang together."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(order) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that falls from positive to negative is 0, to the last bit or so."""
    for _ in range(200):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0
