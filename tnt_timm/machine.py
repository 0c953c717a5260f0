"""What the system says of its processor."""

from typing import Optional


def cpu_info(field: str) -> Optional[str]:
    """A line of Linux's /proc/cpuinfo, such as 'model name', 'vendor_id' or 'flags'; None where there is none."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return None
