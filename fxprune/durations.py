"""How long something takes, in words."""

MINUTE, HOUR, DAY = 60, 3600, 86400


def in_words(seconds: float) -> str:
    """About how long, as one would say it.

    >>> in_words(0.4), in_words(47.0), in_words(185.0), in_words(5900.0), in_words(3e5)
    ('1 s', '50 s', '3 minutes', '1.6 hours', '3 days')
    """
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    if seconds < 95:
        return f"{round(seconds, -1):.0f} s"
    if seconds < 95 * MINUTE:
        return f"{seconds / MINUTE:.0f} minutes"
    return f"{seconds / HOUR:.2g} hours" if seconds < 2 * DAY else f"{seconds / DAY:.0f} days"
