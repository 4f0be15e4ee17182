"""How quickstart's small parts were trained; not shipped."""
