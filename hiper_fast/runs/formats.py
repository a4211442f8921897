"""Numbers as the displays and the report show them; a dash where there is none."""

from __future__ import annotations

NOTHING = "–"
MINUTE, HOUR = 60, 3600  # seconds


def format_percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f}%"


def format_decimal(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"


def format_whole(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def format_seconds(value: float | None) -> str:
    """12.3s, 4m05s, 1h23m."""
    if value is None:
        return NOTHING
    if value < MINUTE:
        return f"{value:.1f}s"
    if value < HOUR:
        return f"{int(value // MINUTE)}m{int(value % MINUTE):02d}s"
    return f"{int(value // HOUR)}h{int(value % HOUR // MINUTE):02d}m"
