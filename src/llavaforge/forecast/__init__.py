"""`llavaforge estimate`: parameters, memory, time and cost of a training from configs alone, without torch."""
