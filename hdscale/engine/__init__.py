"""The engine room: DeepSpeed set-up, checkpoint, pre-emption, logging."""
