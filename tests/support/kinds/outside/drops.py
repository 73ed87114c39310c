from math import cos, pi, sin

import numpy as np
import torch
from drops import VideoNet
from sampler import sample

given = np.load("given.npz")
net = VideoNet().eval()
net.load_state_dict(torch.load("drops.pt"))


def velocity(x, t):
    alpha, sigma = sin(pi / 2 * t), cos(pi / 2 * t)
    clean = net(x, torch.full((len(x),), t))
    return pi / 2 * (sigma * clean - alpha * (x - alpha * clean) / sigma)


with torch.no_grad():
    np.save("samples.npy", sample(velocity, torch.from_numpy(given["x0"])))
