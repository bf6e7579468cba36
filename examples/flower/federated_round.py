"""A round of Flower on this machine: two clients with an image each send what they trained, and the server keeps it.

Everything that the server of a federated average sees is in the files that it saves: the weights that it sent, and those that
each client sent back. An audit takes the two, and the client's learning rate.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from gdiff_jax.images import BUNDLED, load_images

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # also in the processes that run the clients

from model import make

LEARNING_RATE = 0.1
CLIENTS = 2

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One step of SGD on the client's own image."""
    k, model = int(context.node_config["partition-id"]), make()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = load_images(BUNDLED, count=CLIENTS)
    x, y = torch.tensor(data.images[k : k + 1]).permute(0, 3, 1, 2) / 255, torch.tensor(data.labels[k : k + 1]).long()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    metrics = MetricRecord({"num-examples": 1, "client": k})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class Keeping(FedAvg):
    """The federated average of a server that keeps what it receives."""

    def __init__(self, folder: Path):
        super().__init__(fraction_evaluate=0.0)
        self.folder = folder

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        torch.save(arrays.to_torch_state_dict(), self.folder / "sent.pt")
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        for reply in replies:
            name = f"client-{reply.content['metrics']['client']}.pt"
            torch.save(reply.content["arrays"].to_torch_state_dict(), self.folder / name)
        return super().aggregate_train(server_round, replies)


def federated_round(folder: Path) -> None:
    """Saves sent.pt, client-0.pt and client-1.pt, and for the audit alone images.npz, the image of client 0."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        Keeping(folder).start(grid, ArrayRecord(make().state_dict()), num_rounds=1)

    run_simulation(server, client, num_supernodes=CLIENTS)
    data = load_images(BUNDLED, count=1)
    np.savez(folder / "images.npz", images=data.images, labels=data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/flower"))
    options, more = parser.parse_known_args()
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    federated_round(folder)
    audit = [sys.executable, str(EXAMPLES.parent / "experiments" / "audit.py"), f"--victim={EXAMPLES / 'model.py'}:make"]
    files = [f"--weights={folder / 'sent.pt'}", f"--gradient={folder / 'client-0.pt'}"]
    update = ["--update", f"--local_learning_rate={LEARNING_RATE}", "--mechanism=none"]
    for name, known in (("inferred", []), ("known", [f"--images={folder / 'images.npz'}"])):
        subprocess.run([*audit, *files, *update, *known, f"--out={folder / name}", *more], check=True)


if __name__ == "__main__":
    main()
