"""What the Jacobians and the loss say."""
