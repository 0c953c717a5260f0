"""Download single files by http and https, within limits of time and size."""

import contextlib
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import List, Union

from tnt_timm.errors import one_line
from tnt_timm.version import __version__

SILENCE_S = 30  # longest wait for a server that sends nothing
TOTAL_S = 120  # longest time of a download; a server that sends a byte now and then would take forever
MAX_BYTES = 200 * 2**20  # no image is larger, and a wrong link must not fill the memory


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def download(url: str, total_s: float = TOTAL_S) -> bytes:
    """Return the content of a URL.

    Args:
        url: of http or https; it may redirect to another one.
        total_s: limit of time in seconds.

    Raises:
        OSError: it cannot be downloaded, or is too large or too slow.
    """
    result: List[Union[bytes, OSError]] = []
    # A thread, because time limits of sockets start again with each byte, and looking up a name has none
    thread = threading.Thread(target=_fetch, args=(url, result), daemon=True)
    thread.start()
    thread.join(total_s)
    if not result:
        raise OSError(f"the download was not complete after {total_s:g} s; download the file first, then pass its path")
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def _fetch(url: str, result: List[Union[bytes, OSError]]) -> None:
    try:
        result.append(_content(url))
    except urllib.error.HTTPError as error:
        result.append(OSError(one_line(error)))
    except urllib.error.URLError as error:
        result.append(OSError(f"cannot be downloaded: {error.reason}"))
    except Exception as error:  # http.client and sockets have many kinds
        own = type(error) is OSError
        result.append(error if own else OSError(f"cannot be downloaded: {type(error).__name__}: {one_line(error)}"))


def _content(url: str) -> bytes:
    address = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters outside of ASCII
    request = urllib.request.Request(address, headers={"User-Agent": f"tnt-timm/{__version__}"})
    with contextlib.closing(_opener().open(request, timeout=SILENCE_S)) as response:
        content = response.read(MAX_BYTES + 1)
        missing = response.length  # announced bytes that did not arrive; None if the server announced no length
    if len(content) > MAX_BYTES:
        raise OSError(f"larger than {MAX_BYTES >> 20} MiB, so not an image")
    if missing:
        raise OSError(f"download incomplete: {missing:,} bytes are missing")
    return content


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https only. urllib's own would follow a redirect to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
