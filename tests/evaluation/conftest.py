import sys
from pathlib import Path

# the tiny model is shared with tests/safety
sys.path.insert(0, str(Path(__file__).parent.parent / "safety"))
