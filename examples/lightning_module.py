"""Lightning: automatic optimization without a backward, with accumulation and a scheduler."""

import lightning as L
import torch
from torch import nn

import zoext
from zoext.integrations.lightning import ZOModuleMixin


class Classifier(ZOModuleMixin, L.LightningModule):  # the mixin is the only change
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        points, labels = batch
        loss = nn.functional.cross_entropy(self.net(points), labels)
        self.log("loss", loss)  # once for each batch: the mean over the probes
        return loss

    def configure_optimizers(self):
        optimizer = zoext.MeZO(self, lr=0.1, mu=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    points = torch.randn(256, 2)
    labels = (points.sum(1) > 0).long()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points, labels), batch_size=32)
    model = Classifier()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=25, accumulate_grad_batches=2, enable_progress_bar=False, **options)
    trainer.fit(model, loader)
    accuracy = (model.net(points).argmax(1) == labels).float().mean()
    print(f"accuracy {accuracy:.2f} after {trainer.global_step} steps")
