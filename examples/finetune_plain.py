"""Fine-tune a bundle's network in a loop of your own: `python finetune_plain.py BUNDLE IMAGES.npz WEIGHTS.safetensors`.

Needs what the bundle's model.py needs (torch, safetensors and the donors' library), not derc. IMAGES.npz holds x, uint8
images (N, H, W, C), and y, class indices (N,). The network takes images in [0, 1]; normalisation is part of it.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset, random_split

EPOCHS, BATCH, RATE = 3, 64, 1e-3


def load_network(bundle: Path) -> torch.nn.Module:
    """The network of a bundle; `build(num_classes)` gives it a fresh head for other labels."""
    spec = importlib.util.spec_from_file_location("model", bundle / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build()


def load_images(path: Path) -> tuple[DataLoader, DataLoader]:
    """Batches to train on, and a fifth of the images to validate on."""
    with np.load(path) as arrays:
        x = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(arrays["y"]).long()
    chosen = torch.Generator().manual_seed(0)
    train, validation = random_split(TensorDataset(x, y), [0.8, 0.2], generator=chosen)
    return DataLoader(train, BATCH, shuffle=True, drop_last=True), DataLoader(validation, 256)


@torch.no_grad()
def accuracy(network: torch.nn.Module, batches: DataLoader) -> float:
    network.eval()
    right = [(network(x).argmax(1) == y).float() for x, y in batches]
    return float(torch.cat(right).mean())


def main(bundle: Path, images: Path, weights: Path) -> None:
    torch.manual_seed(0)
    network, (batches, validation) = load_network(bundle), load_images(images)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * len(batches))
    print(f"epoch 0 validation {accuracy(network, validation):.4f}")
    for epoch in range(1, EPOCHS + 1):
        network.train()
        for x, y in batches:
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch} validation {accuracy(network, validation):.4f}")
    save_file(network.state_dict(), weights)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
