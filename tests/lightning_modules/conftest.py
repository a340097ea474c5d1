import sys
from pathlib import Path

# The importlib mode of pytest does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))
