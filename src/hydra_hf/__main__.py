"""python -m hydra_hf"""

import sys

from .cli import main


sys.exit(main())
