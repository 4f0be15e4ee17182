"""The stock Llava, stepped: attention, tower, loss, what learns."""
