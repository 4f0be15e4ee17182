"""Every class of fault, and what proves what happens then."""
