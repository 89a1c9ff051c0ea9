"""Numbers as people read them, for tables and pages.

>>> bytes_text(1536), seconds_text(0.00123), si_text(8.03e9)
('1.5 KiB', '1.23 ms', '8.03 G')
"""


def bytes_text(count: float | None) -> str:
    """1536 -> '1.5 KiB'. None prints as a dash."""
    if count is None:
        return "-"
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def seconds_text(seconds: float | None) -> str:
    """0.00123 -> '1.23 ms'. None prints as a dash."""
    if seconds is None:
        return "-"
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def si_text(value: float | None) -> str:
    """8.03e9 -> '8.03 G'. None prints as a dash."""
    if value is None:
        return "-"
    for scale, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"
