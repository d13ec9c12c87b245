"""The folder in which built kernels and measured times are kept, and who may have written what lies there.

Code is loaded from it, so it is made for its owner alone, and nothing is loaded that somebody else could have put
there. `FXPRUNE_CACHE` names the folder (default: `~/.cache/fxprune`).
"""

import os
import stat
from pathlib import Path


def cache_directory() -> Path:
    """Where built kernels and measured times are kept; not made yet."""
    chosen = os.environ.get("FXPRUNE_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else base / "fxprune"


def make_cache_directory() -> Path:
    """The folder, made for its owner alone (0700) unless it is there.

    Raises:
        OSError: it cannot be made.
    """
    folder = cache_directory()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def distrust(path: Path) -> str:
    """Why what lies at a path must not be loaded: it, or what it points to, is somebody else's, or others may write it;
    empty if nothing is wrong. Where there are no owners (Windows) nothing is.

    Raises:
        OSError: there is no such path.
    """
    if not hasattr(os, "getuid"):
        return ""
    about = path.stat()
    if about.st_uid != os.getuid():
        return f"{path} belongs to another user (uid {about.st_uid})"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write {path} (mode {stat.S_IMODE(about.st_mode):o})"
    return ""
