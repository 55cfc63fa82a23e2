import sys
from pathlib import Path

# their tiny models
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / room) for room in ("safety", "training")]
