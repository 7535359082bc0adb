"""Numbers and lists as people read them; a value that is missing is a dash."""

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
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def listed(items: list[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""
