"""Lets tests import the modules beside them, which run in several processes too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
