import numpy as np
import torch
from sampler import sample_network
from shapes import PointFlow

given = np.load("given.npz")
net = PointFlow().eval()
net.load_state_dict(torch.load("rings.pth")["state_dict"])
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x), 1), t)), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
