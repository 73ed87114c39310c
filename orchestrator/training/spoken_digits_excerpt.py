"""Makes the excerpt of spoken digits shipped with the package.

Run ``python -m orchestrator.training.spoken_digits_excerpt FOLDER`` by hand when the features change, and commit the
file it writes. FOLDER holds fsdd.parquet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from orchestrator.audio.mel import LOUDEST, SILENCE
from orchestrator.datasets.spoken_digits import METADATA_KEY, SHIPPED, STEPS, read_recordings
from orchestrator.storage import Storage


def main(folder: str) -> None:
    """Write the features of the test split of ``fsdd.parquet`` in ``folder``, quantised to bytes."""
    recordings = read_recordings(Path(folder), "test")
    values = np.concatenate(recordings.features, axis=1)
    stored = np.clip(np.rint((values - SILENCE) / (LOUDEST - SILENCE) * STEPS), 0, STEPS).astype(np.uint8)
    lengths = np.array([features.shape[1] for features in recordings.features], dtype=np.int64)
    about = {
        "speakers": recordings.speakers,
        "source": "Free Spoken Digit Dataset, takes 0-4, CC BY-SA 4.0, https://github.com/Jakobovski/"
        "free-spoken-digit-dataset, as log-mel frames",
    }
    tensors = {"features": stored, "lengths": lengths, "digits": recordings.digits}
    content = save(tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)})
    Storage.at(SHIPPED.parent).write(SHIPPED.name, content)
    print(f"{SHIPPED}: {len(lengths)} recordings, {len(content):,} bytes, largest value {values.max():.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
