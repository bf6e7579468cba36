"""One DP-SGD step of Opacus, saved as it leaves the client, and what an audit makes of it.

The step is of one image, the first of the bundled ones, so that the noise on it is noise_multiplier x max_grad_norm. Sigma and
clipping are read off Opacus's own settings, and the audit holds what it is given against them before it attacks.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from gdiff_jax.images import BUNDLED, load_images

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from model import make


def step(folder: Path, noise_multiplier: float, max_grad_norm: float) -> list[str]:
    """Saves image, weights and gradient of one step in a folder; returns the flags that tell the audit of them."""
    data = load_images(BUNDLED, count=1)
    np.savez(folder / "images.npz", images=data.images, labels=data.labels)
    pixels = torch.tensor(data.images).permute(0, 3, 1, 2) / 255  # as ToTensor
    model = make()
    torch.save(model.state_dict(), folder / "weights.pt")
    loader = DataLoader(TensorDataset(pixels, torch.tensor(data.labels).long()), batch_size=1)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, poisson_sampling=False,
    )  # fmt: skip
    ((x, y),) = loader
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.pre_step()  # clips, adds noise, and divides by the batch size of one
    torch.save({name: p.grad for name, p in model.named_parameters()}, folder / "leak.pt")
    sigma = optimizer.noise_multiplier * optimizer.max_grad_norm / optimizer.expected_batch_size
    return [
        f"--images={folder / 'images.npz'}", f"--weights={folder / 'weights.pt'}", f"--gradient={folder / 'leak.pt'}",
        f"--mechanism=clip:{optimizer.max_grad_norm}+gaussian", f"--sigma_grid={sigma}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise_multiplier", type=float, default=0.001)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/opacus"))
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    flags = step(options.out, options.noise_multiplier, options.max_grad_norm)
    audit = [sys.executable, str(EXAMPLES.parent / "experiments" / "audit.py"), f"--victim={EXAMPLES / 'model.py'}:make"]
    sys.exit(subprocess.call([*audit, *flags, f"--out={options.out / 'audit'}", *more]))


if __name__ == "__main__":
    main()
