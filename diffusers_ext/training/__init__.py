"""Training on accelerate: options in `config`, images in `data`, losses in `objectives`, and one `loop` for all."""
