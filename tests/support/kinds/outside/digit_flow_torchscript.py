import numpy as np
import torch
from sampler import GUIDANCE_SCALE, sample

given = np.load("given.npz")
net, y = torch.jit.load("digit_flow.ts"), torch.from_numpy(given["y"])


def velocity(x, t):
    time = torch.full((len(x),), t)
    dropped = net(x, time, torch.full_like(y, 10))
    return dropped + GUIDANCE_SCALE * (net(x, time, y) - dropped)


with torch.no_grad():
    np.save("samples.npy", sample(velocity, torch.from_numpy(given["x0"])))
