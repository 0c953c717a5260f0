"""Read CPU properties from the operating system."""

from typing import Optional


def cpu_info(field: str) -> Optional[str]:
    """Return a field of /proc/cpuinfo, such as 'model name', 'vendor_id' or 'flags'; None if it does not exist."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return None
