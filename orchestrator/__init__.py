"""The parts of a distillation run: models, pairs, hosts, metrics, tracking, reports. Never imports ``sweeps``."""

import sys

STARTED_WITH = tuple(sys.path)
"""The import path that this process was started with. A model's own folder is added to ``sys.path`` later."""
