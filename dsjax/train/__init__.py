"""Loss, optimizer and the training step."""
