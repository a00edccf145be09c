"""What a speed-up of training is shown with: data, the loop, checkpoints. Each file stands alone."""
