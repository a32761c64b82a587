"""Exit with 0 if the advisory service of `make audit` can be reached; behind a package mirror it cannot."""

import json
import sys
import urllib.request

try:
    with urllib.request.urlopen("https://pypi.org/pypi/pip/25.0/json", timeout=10) as answer:
        sys.exit("vulnerabilities" not in json.load(answer))
except (OSError, ValueError):
    sys.exit(1)
