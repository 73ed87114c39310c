import numpy as np
import torch
from sampler import GUIDANCE_SCALE, sample_network
from wine_table import TableDenoiser

given = np.load("given.npz")
net = TableDenoiser(columns=13, classes=3, steps=100).eval()
weights = torch.load("wine.pt")["model"]
net.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
y = torch.from_numpy(given["y"])


def network(x, t):
    time = torch.full((len(x),), t)
    dropped, conditional = (net(x, time, labels) for labels in (torch.zeros_like(y), y))
    return dropped + GUIDANCE_SCALE * (conditional - dropped)


with torch.no_grad():
    samples = sample_network(network, torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
