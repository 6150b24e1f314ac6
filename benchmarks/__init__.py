"""Times of the operators at the papers' sizes, beside the best alternatives and the machine's ceilings."""
