"""Fabric: a loop with accumulation."""

import torch
from lightning.fabric import Fabric
from torch import nn

import zoext


def main() -> None:
    torch.manual_seed(0)
    points = torch.randn(256, 2)
    labels = (points.sum(1) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points, labels), batch_size=32)
    fabric = Fabric(accelerator="cpu")
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model, optimizer = fabric.setup(model, zoext.MeZO(model, lr=0.1, mu=1e-3))
    loader = fabric.setup_dataloaders(loader)

    def loss_of(points, labels):
        return nn.functional.cross_entropy(model(points), labels)

    for _ in range(25):
        for index, batch in enumerate(loader):
            loss = optimizer.estimate(lambda batch=batch: loss_of(*batch)).loss  # instead of fabric.backward
            if index % 2:
                optimizer.step()  # applies the mean of the estimates

    accuracy = (model(points).argmax(1) == labels).float().mean()
    fabric.print(f"accuracy {accuracy:.2f}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
