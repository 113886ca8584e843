"""What to do about gradients that vanish or explode."""
