import numpy as np
import torch
from edm_transformer import EDMPrecond
from sampler import sample_network

given = np.load("given.npz")
net = EDMPrecond().eval()
net.load_state_dict(torch.load("edm_digits.pt"))
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x),), t)), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
