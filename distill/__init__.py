"""Co-distillation: teacher targets, their store, the loss, and how soft and hard targets share."""
