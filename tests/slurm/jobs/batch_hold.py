"""A callback that holds training before a batch; see `holds`."""

import holds
import lightning as L


class BatchHold(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        holds.reach(f"epoch{trainer.current_epoch}-batch{batch_idx}")
