"""Cost: seconds and bytes of operators, collectives, instructions and steps, by formulas over numbers or arrays."""
