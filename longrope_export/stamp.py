"""What every record that we write begins with."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

from longrope_export import __version__


def stamp(format_name: str, version: int) -> dict[str, Any]:
    """Format, its version, time (UTC), tool and platform, as JSON values."""
    return {
        "format": format_name,
        "version": version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": f"longrope-export {__version__}",
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
    }
