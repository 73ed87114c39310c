import numpy as np
import torch
from digit_flow import DigitFlow
from sampler import GUIDANCE_SCALE, sample

given = np.load("given.npz")
y = torch.from_numpy(given["y"])
net = DigitFlow().eval()
net.load_state_dict(torch.load("digit_flow.pt"))


def velocity(x, t):
    time = torch.full((len(x),), t)
    dropped = net(x, time, torch.full_like(y, 10))
    return dropped + GUIDANCE_SCALE * (net(x, time, y) - dropped)


with torch.no_grad():
    np.save("samples.npy", sample(velocity, torch.from_numpy(given["x0"])))
