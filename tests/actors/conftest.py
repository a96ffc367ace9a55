from __future__ import annotations

import sys
from pathlib import Path

# Environment processes import the zoo by its bare name: an installed package is called `tests` too.
sys.path.insert(0, str(Path(__file__).parent))
