"""From an image file's bytes to the tower's pixels."""
