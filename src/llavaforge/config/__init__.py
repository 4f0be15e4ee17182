"""Options of every verb, and how recipes and flags become them."""
