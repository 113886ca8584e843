"""Tasks, the networks that learn them, and the loop that trains."""
