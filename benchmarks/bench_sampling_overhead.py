"""What NSSolver costs over the bare model calls that it makes: python benchmarks/bench_sampling_overhead.py"""

from __future__ import annotations

import torch
from timing import interleaved, report

from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.field import FunctionField
from solvers.grids import Grid
from solvers.schedulers import CondOT

NFE = 8


def main() -> None:
    torch.set_num_threads(1)
    solver = GridSolver(Euler(), NFE, Grid()).to_ns(CondOT())
    for width, batch in ((256, 64), (1024, 64), (2048, 64)):
        net = torch.nn.Sequential(
            torch.nn.Linear(3072, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()
        )
        net.append(torch.nn.Linear(width, 3072)).requires_grad_(False)
        x0 = torch.randn(batch, 3072)
        field = FunctionField(lambda x, t, net=net: net(x), CondOT())
        t = torch.zeros((), dtype=torch.float64)

        def bare(field: FunctionField = field, x0: torch.Tensor = x0, t: torch.Tensor = t) -> None:
            for _ in range(NFE):
                field(x0, t)

        with torch.no_grad():
            medians = interleaved(
                {"bare model calls": bare, "NSSolver.sample": lambda f=field, x=x0: solver.sample(f, x)}, rounds=31
            )
        report(f"{NFE} calls of a {width}-wide network, batch {batch} x 3072", medians, "bare model calls")


if __name__ == "__main__":
    main()
