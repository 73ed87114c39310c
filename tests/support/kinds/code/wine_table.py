"""A tabular diffusion (rows of the wine table), in the style of TabDDPM: noise prediction at integer timesteps."""

from torch import nn


class TableDenoiser(nn.Module):
    """An MLP on a row, a timestep's row of a table, and a class; class 0 stands for "any"."""

    def __init__(self, columns: int, classes: int, steps: int, width: int = 128):
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.label = nn.Embedding(classes + 1, width)
        self.inward = nn.Linear(columns, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, columns))

    def forward(self, x, timesteps, y):
        return x + self.body(self.inward(x) + self.time(timesteps) + self.label(y))
