"""Puts this folder on the path, so that the tests here and elsewhere import ``build_hostile``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
