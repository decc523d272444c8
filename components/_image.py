"""Which image do the steps run in on a cluster?"""

import os

from perennial import __version__

# The tag changes with the code, because the cache key of a step holds its image and not its code.
IMAGE = os.environ.get("PERENNIAL_IMAGE") or f"perennial:{__version__}-python3.11"
