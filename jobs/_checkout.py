"""Makes the package of this checkout importable, for a job that is started as a file from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
