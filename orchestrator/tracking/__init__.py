"""Experiments in MLflow. Only :mod:`.mlflow`, :mod:`.ping` and :mod:`.sqlite_store` import it at run time."""

import os

# Set before the import, since mlflow reads these variables when it loads.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would print the password of the address
