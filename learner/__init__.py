"""The learner: batches, the training loop, publishing, checkpoints and reports."""
