import numpy as np
import torch
from drops import VideoNet
from sampler import sample_network

given = np.load("given.npz")
net = VideoNet().eval()
net.load_state_dict(torch.load("drops.pt"))
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x),), t)), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
