"""Whether some addresses answer: `python -m deploy.healthz URL …`, for health checks of containers.

A check runs every few seconds for the whole life of a container, so this loads nothing heavy.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 5.0


def trouble(url: str, token: str = "", timeout_s: float = TIMEOUT_S) -> str:
    """Return what is wrong with an address, or nothing if it answers with a success.

    Blocks for at most about `timeout_s`.

    Args:
        url: to be fetched.
        token: sent as a bearer token if there is one.
        timeout_s: seconds until it counts as silent.
    """
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    # An address of this container is never behind a proxy, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(300).decode(errors="replace").split())
        return f"{url} answers {error.code}: {said}"
    except (OSError, ValueError) as error:
        return f"{url} does not answer: {error}"
    return ""


def main(args: Sequence[str], token_file: str = "") -> int:
    """Check every address; says what is wrong and returns 1, or returns 0."""
    token = Path(token_file).read_text().strip() if token_file else ""
    found = [text for url in args if (text := trouble(url, token))]
    for text in found:
        sys.stderr.write(f"{text}\n")
    return 1 if found or not args else 0


if __name__ == "__main__":
    import os

    sys.exit(main(sys.argv[1:], os.environ.get("RAY_AUTH_TOKEN_PATH", "")))
