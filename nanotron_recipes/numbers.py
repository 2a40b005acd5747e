"""Large numbers as people say them."""

from __future__ import annotations


def short_number(number: float) -> str:
    """Return three significant digits with K, M, B or T: 361280 → 361K, 3075098624 → 3.08B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999,600 is a million to three digits.
        if abs(number) >= limit * 0.9995:
            scaled = number / limit
            decimals = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{decimals}f}{unit}"
    return f"{number:.3g}"


def counted(count: int, noun: str) -> str:
    """`1 replica`, `2 replicas`, `3 micro-batches`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
