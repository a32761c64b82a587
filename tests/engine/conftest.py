"""What every engine test shares."""

from __future__ import annotations

import logging

# pytest's log capture would have torch write down every trace
logging.getLogger("torch.__trace").setLevel(logging.WARNING)
