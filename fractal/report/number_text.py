"""Numbers as text, for the page, the terminal and LOG.md. What is not known is a dash."""

from fractal.selection.bootstrap import Interval

DASH = "\u2013"
MINUS = "\u2212"


def percent(value: float | None, decimals: int = 1) -> str:
    """0.4123 -> "41.2 %"; None and NaN -> a dash."""
    return DASH if value is None or value != value else f"{100 * value:.{decimals}f}\u00a0%".replace("-", MINUS)


def points(value: float) -> str:
    """Percentage points with their sign: 0.111 -> "+11.1"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", MINUS)  # + 0.0: never "-0.0"


def span(interval: Interval, signed: bool = False) -> str:
    """The interval in percent, "[20.1, 62.5]"; a dash where the bootstrap saw no variation and so knows nothing."""
    if interval.low == interval.high:
        return f"[{DASH}]"
    ends = [points(end) if signed else f"{100 * end:.1f}".replace("-", MINUS) for end in (interval.low, interval.high)]
    return f"[{ends[0]},\u00a0{ends[1]}]"


def plain_span(interval: Interval | None) -> str:
    """The interval as numbers, "[0.612, 0.741]"."""
    if interval is None or interval.low == interval.high:
        return f"[{DASH}]"
    return f"[{interval.low:.3f},\u00a0{interval.high:.3f}]"


def number(value: float | None, decimals: int = 3) -> str:
    if value is None or value != value:
        return DASH
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}").replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Seconds as "4.2 s", "12 min 05 s" or "3 h 20 min"."""
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.1f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes}\u00a0min\u00a0{rest:02}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02}\u00a0min"


def when(date: str) -> str:
    """2026-11-24T10:00:00+00:00 -> "2026-11-24 10:00 UTC"; anything else stays as it is."""
    if date[10:11] == "T" and date.endswith("+00:00"):
        return f"{date[:10]} {date[11:16]} UTC"
    return date


def spaced(name: str) -> str:
    """mean_logprob -> "mean logprob"."""
    return name.replace("_", " ")


def dash(value: object) -> object:
    return DASH if value is None or value == "" else value


def visible(text: str) -> str:
    """The text with every character that does not show, or that turns others round, as ⟨U+202E⟩."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t\u00a0" else f"\u27e8U+{ord(char):04X}\u27e9" for char in text
    )
