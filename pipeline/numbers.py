"""Numbers, durations and lists as people read them. A missing value is a dash."""

import time

MISSING = "-"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def money(usd: float | None) -> str:
    return MISSING if usd is None else f"${usd:,.2f}"


def count(number: float | None) -> str:
    """1234567 as 1.23 M; small whole numbers as they are."""
    if number is None:
        return MISSING
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"


def number(value: float | None, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(fraction: float | None) -> str:
    """0.9724 as 97.2%."""
    return MISSING if fraction is None else f"{100 * fraction:.1f}%"


def day(at: float | None) -> str:
    """Seconds since the epoch as a date and time in UTC."""
    return MISSING if at is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def plural(number: int, word: str) -> str:
    ending = "" if number == 1 else "es" if word.endswith("s") else "s"
    return f"{number:,} {word}{ending}"


def listed(items: list[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def data_size(size: int) -> str:
    """1234567 as 1.2 MB, 1234 as 1.2 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def short(value: float) -> str:
    """12,345, 12.5, or 12: of progress."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.1f}"


def metric(value: object) -> str:
    """12,345 or 0.01234: a measurement; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
