"""Training on accelerate: options, images, losses, tasks, and one loop for all of them."""
