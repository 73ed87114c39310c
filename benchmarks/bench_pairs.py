"""Making and storing ground-truth pairs against a bare torchdiffeq loop over the same batches.

python benchmarks/bench_pairs.py
"""

from __future__ import annotations

import tempfile

import torch
from timing import interleaved, report
from torchdiffeq import odeint

from orchestrator.host import Host, HostSettings
from orchestrator.pairs import PairSpec
from orchestrator.pairs.ground_truth import largest_sample_rms
from orchestrator.randomness import noise

PAIRS, BATCH = 256, 64


def main() -> None:
    with tempfile.TemporaryDirectory() as storage:
        host = Host(HostSettings(adapter="zoo", options={"weights": "digits_fm_ot"}, storage=storage, threads=1))
        spec = PairSpec(
            model_digest=host.model.digest,
            conditioning={"name": "labels", "options": {"classes": 10}},
            guidance_scale=1.0,
            shape=host.model.shape,
            seed=0,
            count=PAIRS,
            batch_size=BATCH,
            shard_size=PAIRS,
            rtol=1e-6,
            atol=1e-6,
            device_class="cpu",
        )
        labels = torch.arange(PAIRS) % 10

        def bare() -> None:
            ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
            options = {"norm": largest_sample_rms, "step_t": ends[1:]}
            for first in range(0, PAIRS, BATCH):
                indices = range(first, first + BATCH)
                x0 = torch.from_numpy(noise(0, indices, host.model.shape)).double()
                label = labels[first : first + BATCH]

                def velocity(t: torch.Tensor, x: torch.Tensor, label: torch.Tensor = label) -> torch.Tensor:
                    return host.model.predict(x, t, label)

                with torch.no_grad():
                    odeint(velocity, x0, ends, rtol=1e-6, atol=1e-6, method="dopri5", options=options)

        medians = interleaved({"bare torchdiffeq": bare, "Host.make_shard": lambda: host.make_shard(spec, 0)}, 7)
        report(f"{PAIRS} pairs of digits_fm_ot in batches of {BATCH}", medians, "bare torchdiffeq")


if __name__ == "__main__":
    main()
