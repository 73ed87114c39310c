import numpy as np
import torch
from imputer import Imputer
from sampler import sample_network

given = np.load("given.npz")
net = Imputer().eval()
weights = torch.load("imputer.pt")["denoiser"]["params"]
net.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in weights.items()})
cond = {name: torch.from_numpy(given[name]) for name in ("values", "mask")}
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x),), t), cond), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
