import numpy as np
import torch
from sampler import sample_network
from waves import SeriesUNet

given = np.load("given.npz")
net = SeriesUNet().eval()
weights = torch.load("waves.ckpt")["state_dict"]
net.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x),), t)), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
