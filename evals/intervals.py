"""How sure a measured proportion is."""

import math

Z95 = 1.959964  # of a two-sided interval of 95%


def wilson(accuracy: float, trials: int) -> tuple[float, float]:
    """The 95% score interval of a proportion (Wilson, 1927)."""
    if trials == 0:
        return 0.0, 1.0
    shrink = 1 + Z95**2 / trials
    centre = (accuracy + Z95**2 / (2 * trials)) / shrink
    half = Z95 / shrink * math.sqrt(accuracy * (1 - accuracy) / trials + Z95**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
