import numpy as np
import torch
from digit_flow import DigitFlow
from sampler import GUIDANCE_SCALE, sample_network

given = np.load("given.npz")
net = DigitFlow().eval()
net.load_state_dict(torch.load("digit_flow.pt"))
y = torch.from_numpy(given["y"])


def network(x, t):
    time = torch.full((len(x),), t)
    dropped, conditional = (net(x, time, labels) for labels in (torch.full_like(y, 10), y))
    return dropped + GUIDANCE_SCALE * (conditional - dropped)


with torch.no_grad():
    samples = sample_network(network, torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
