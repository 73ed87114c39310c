import numpy as np
import torch
from reach_policy import PolicyNet
from sampler import sample_network

given = np.load("given.npz")
net = PolicyNet().eval()
for weight, average in zip(
    net.parameters(), torch.load("reach.ckpt")["state_dicts"]["ema"]["shadow_params"], strict=True
):
    weight.data.copy_(average)
obs = torch.from_numpy(given["obs"])
with torch.no_grad():
    samples = sample_network(lambda x, t: net(x, torch.full((len(x),), t), obs), torch.from_numpy(given["x0"]))
np.save("samples.npy", samples)
