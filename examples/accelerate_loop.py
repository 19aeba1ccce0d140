"""Accelerate: a loop with accumulation. Launch it on several processes with `accelerate launch`."""

import torch
from torch import nn

import zoext
from zoext.integrations.accelerate import ZOAccelerator


def main() -> None:
    torch.manual_seed(0)
    points = torch.randn(256, 2)
    labels = (points.sum(1) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points, labels), batch_size=32)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = zoext.MeZO(model, lr=0.1, mu=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    accelerator = ZOAccelerator(gradient_accumulation_steps=2)  # instead of Accelerator
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    def loss_of(points, labels):
        return nn.functional.cross_entropy(model(points), labels)

    for _ in range(25):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = optimizer.step(loss_of, *batch)  # instead of forward, backward and step
                scheduler.step()
                optimizer.zero_grad()

    points, labels = points.to(accelerator.device), labels.to(accelerator.device)
    accuracy = (model(points).argmax(1) == labels).float().mean()
    accelerator.print(f"accuracy {accuracy:.2f}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
